"""duquantpp_jax: rotations, MX scale rules and rounding for 4-bit language models, in JAX."""

from duquantpp_jax.core import Chain, Fitted, Format, MXArray, Recipe, ScaleRule, Stats, Transform
from duquantpp_jax.formats import MXFP4

__version__ = "0.1.0"

__all__ = [
    "MXFP4",
    "Chain",
    "Fitted",
    "Format",
    "MXArray",
    "Recipe",
    "ScaleRule",
    "Stats",
    "Transform",
]
