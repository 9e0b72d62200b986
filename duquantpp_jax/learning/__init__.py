"""What an optimiser moves, through which loss, and the one training loop.

Names are imported when they are asked for: recipes.py names fits that learn, and some of what is
here learns from recipes.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from duquantpp_jax.learning.blocks import learn_blocks
    from duquantpp_jax.learning.model import LearnResult, learn_model
    from duquantpp_jax.learning.moves import LearningLinear, Moves
    from duquantpp_jax.learning.named import LearnSettings, learn
    from duquantpp_jax.learning.site import FitLearned
    from duquantpp_jax.learning.training import Objective, train

__all__ = [
    "FitLearned",
    "LearnResult",
    "LearnSettings",
    "LearningLinear",
    "Moves",
    "Objective",
    "learn",
    "learn_blocks",
    "learn_model",
    "train",
]

_FILES = {
    "blocks": ("learn_blocks",),
    "model": ("LearnResult", "learn_model"),
    "moves": ("LearningLinear", "Moves"),
    "named": ("LearnSettings", "learn"),
    "site": ("FitLearned",),
    "training": ("Objective", "train"),
}


def __getattr__(name: str) -> Any:
    for file, names in _FILES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
