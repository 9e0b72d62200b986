"""What an optimiser moves, through which loss, and the one training loop.

`learning.named` has all of this by names and numbers, as `duquantpp learn` does. It stands above
recipes.py, which names fits that learn, and is imported by itself.
"""

from duquantpp_jax.learning.blocks import learn_blocks
from duquantpp_jax.learning.model import learn_model
from duquantpp_jax.learning.moves import LearningLinear, Moves
from duquantpp_jax.learning.site import FitLearned
from duquantpp_jax.learning.training import Objective, Trained, train

__all__ = ["FitLearned", "LearningLinear", "Moves", "Objective", "Trained"]
__all__ += ["learn_blocks", "learn_model", "train"]
