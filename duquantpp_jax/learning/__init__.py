"""What an optimiser moves, through which loss, and the one training loop.

Here is what recipes.py names fits by. `learning.blocks` and `learning.model` learn through more
than a site, and `learning.named` has all of this by names and numbers, as `duquantpp learn` does:
they stand above recipes.py and are imported by themselves.

>>> from duquantpp_jax import recipe
>>> from duquantpp_jax.transforms import FitHadamard
>>> from duquantpp_jax.transforms.learned import Cayley
>>> fit = FitLearned(Moves(Cayley(), clip="block"), FitHadamard(), steps=200)
>>> method = recipe(fit, "mxfp4:even")  # for `quantize`, `Plan` and `Cell`, as any other
>>> method.fit.steps
200
"""

from duquantpp_jax.learning.moves import LearningLinear, Moves
from duquantpp_jax.learning.site import FitLearned
from duquantpp_jax.learning.training import Objective, Trained, train

__all__ = ["FitLearned", "LearningLinear", "Moves", "Objective", "Trained", "train"]
