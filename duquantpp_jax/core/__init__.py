"""The five types that everything here is made of, and the one law.

    Format     how numbers are rounded          x ~ element * scale, one scale a block
    MXArray    a quantized array                elements, scales
    Transform  how a linear's input is moved    t.activations(x) @ t.weights(w).T == x @ w.T
    Stats      what calibration keeps           a fold whose merge is associative
    Recipe     a whole method                   fit, rounding, two formats

A new method is a new value of one of them. The other rooms make such values.
"""

from duquantpp_jax.core.arrays import Element, Format, MXArray
from duquantpp_jax.core.choices import ElementRounding, ScaleRule
from duquantpp_jax.core.exact import Exact
from duquantpp_jax.core.recipe import (
    Fit,
    Fitted,
    RandomKey,
    Recipe,
    Rounding,
    Weights,
    shared,
    stack,
)
from duquantpp_jax.core.stats import Needs, Stats
from duquantpp_jax.core.transform import Blocks, Chain, Channels, Cost, Transform, diagonal_blocks

__all__ = ["Blocks", "Chain", "Channels", "Cost", "Element", "ElementRounding", "Exact", "Fit"]
__all__ += ["Fitted", "Format", "MXArray", "Needs", "RandomKey", "Recipe", "Rounding", "ScaleRule"]
__all__ += ["Stats", "Transform", "Weights", "diagonal_blocks", "shared", "stack"]
