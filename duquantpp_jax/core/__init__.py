"""The five types that everything here is made of, and the one law.

    Format     how numbers are rounded          x ~ element * scale, one scale a block
    MXArray    a quantized array                elements, scales
    Transform  how a linear's input is moved    t.activations(x) @ t.weights(w).T == x @ w.T
    Stats      what calibration keeps           a fold whose merge is associative
    Recipe     a whole method                   fit, rounding, two formats

A new method is a new value of one of them. The other rooms make such values.

>>> import jax, jax.numpy as jnp, numpy as np
>>> from duquantpp_jax import MXFP4, recipe
>>> x, w = np.random.default_rng(0).standard_normal((2, 64, 64), np.float32)
>>> stats = Stats.init(64, 1, 64, needs=Needs.NOTHING).update(jnp.asarray(x[None]), jnp.int32(0))
>>> method = recipe("smooth_hadamard", MXFP4(scale_rule=ScaleRule.EVEN))
>>> isinstance(method, Recipe)
True
>>> fitted = method.fit((jnp.asarray(w),), stats, method, jax.random.key(0))
>>> isinstance(fitted, Fitted), isinstance(fitted.transform, Chain)
(True, True)
>>> t = fitted.transform
>>> np.allclose(t.activations(x) @ t.weights(w).T, x @ w.T, atol=1e-4)
True
>>> codes = method.activation_format.quantize(t.activations(x))
>>> isinstance(codes, MXArray), codes.elements.shape, codes.scales.shape
(True, (64, 64), (64, 2))
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
