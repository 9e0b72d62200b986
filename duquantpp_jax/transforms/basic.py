"""Transforms that do not mix channels, and the fit that composes fits.

    Identity   T = I
    Smooth     T = diag(1 / s)            x / s,  w * s
    Permute    T a permutation matrix     x and w with their channels in another order

Source: SmoothQuant, Xiao et al., arXiv 2211.10438 (its equations 3 and 4).
"""

import dataclasses
import functools
import operator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from duquantpp_jax.core import (
    Blocks,
    Channels,
    Cost,
    Fit,
    Fitted,
    Needs,
    RandomKey,
    Recipe,
    Stats,
    Transform,
    Weights,
    shared,
    stack,
)


@struct.dataclass
class Identity(Transform):
    """T = I."""

    keeps_channels, mixes_channels = True, False

    def activations(self, x: Float[Array, "*tokens k"]) -> Float[Array, "*tokens k"]:
        return x

    def weights(self, w: Float[Array, "*outputs k"]) -> Float[Array, "*outputs k"]:
        return w

    def inverse(self) -> Transform:
        return self

    def cost(self, width: int) -> Cost:
        return Cost(fuses=True)

    def as_channels(self, width: int) -> Channels:
        return Channels.nothing(width)

    def as_blocks(self, width: int, size: int) -> Blocks:
        return Blocks()


@struct.dataclass
class Smooth(Transform):
    """T = diag(1 / s): divides channel j of the input by s_j, multiplies column j of w by s_j."""

    scale: Float[Array, "*layers k"]
    keeps_channels, mixes_channels = True, False

    def activations(self, x: Float[Array, "*tokens k"]) -> Float[Array, "*tokens k"]:
        return x / self.scale

    def weights(self, w: Float[Array, "*outputs k"]) -> Float[Array, "*outputs k"]:
        return w * self.scale

    def inverse(self) -> Transform:
        return Smooth(1 / self.scale)

    def cost(self, width: int) -> Cost:
        return Cost(1, self.scale.nbytes, fuses=True)

    def as_channels(self, width: int) -> Channels:
        return Channels(np.arange(self.scale.shape[-1]), np.asarray(self.scale))

    def as_blocks(self, width: int, size: int) -> Blocks:
        return Blocks(self.scale)


@struct.dataclass
class Permute(Transform):
    """T is a permutation matrix: channel j of the moved input is channel order[j] of the input."""

    order: Int[Array, "*layers k"]
    mixes_channels = False

    def activations(self, x: Float[Array, "*tokens k"]) -> Float[Array, "*tokens k"]:
        width = self.order.shape[-1]
        if x.shape[-1] != width:  # a gather clamps indices out of range without an error
            raise ValueError(f"a permutation of {width} channels got a width of {x.shape[-1]}")
        return jnp.take(x, self.order, axis=-1)

    def weights(self, w: Float[Array, "*outputs k"]) -> Float[Array, "*outputs k"]:
        return self.activations(w)

    def inverse(self) -> Transform:
        return Permute(jnp.argsort(self.order, axis=-1).astype(self.order.dtype))

    def cost(self, width: int) -> Cost:
        return Cost(0, self.order.nbytes, fuses=True)

    def as_channels(self, width: int) -> Channels:
        order = np.asarray(self.order)
        return Channels(order, np.ones(len(order), np.float32))


@dataclasses.dataclass(frozen=True)
class FitIdentity:
    """Inputs stay as they are.

    Source: by definition.
    """

    needs = Needs.NOTHING

    def __call__(self, weights: Weights, stats: Stats, recipe: Recipe, key: RandomKey) -> Fitted:
        return Fitted(Identity())


@dataclasses.dataclass(frozen=True)
class FitSmooth:
    """s_j = max |x_j|^alpha / max_i |w_ij|^(1 - alpha), both maxima and s at least 1e-5.

    Attributes:
      alpha: Strength: 0 balances by the weights alone, 1 by the activations alone. Another value
        does not recompile.
      weight_max: Maximum over the rows i of "all" linears that share the input, or of the "first"
        (q_proj, up_proj), as in the released DuQuant++ code.
      floor: Least |s_j|.

    Source: arXiv 2211.10438, equation 4; floors of the code released with arXiv 2604.17789.
    """

    alpha: float | Float[Array, ""] = 0.6
    weight_max: Literal["all", "first"] = "all"
    floor: float = 1e-5
    needs = Needs.NOTHING

    def __call__(self, weights: Weights, stats: Stats, recipe: Recipe, key: RandomKey) -> Fitted:
        w = stack(weights) if self.weight_max == "all" else weights[0]
        return Fitted(Smooth(_smooth_scale(w, stats.absmax, self.alpha, self.floor)))


@jax.jit
def _smooth_scale(
    w: Float[Array, "n k"], absmax: Float[Array, " k"], alpha: Array, floor: Array
) -> Float[Array, " k"]:
    x_max = jnp.maximum(absmax, 1e-5)
    w_max = jnp.maximum(jnp.max(jnp.abs(w), axis=0), 1e-5)
    return jnp.maximum(x_max**alpha / w_max ** (1 - alpha), floor)


@dataclasses.dataclass(frozen=True)
class FitInTurn:
    """Fits in turn, each on weights and inputs moved by the earlier fits, and composes them."""

    fits: tuple[Fit, ...]

    @property
    def needs(self) -> Needs:
        return functools.reduce(operator.or_, (fit.needs for fit in self.fits), Needs.NOTHING)

    @property
    def draws(self) -> bool:
        return any(getattr(fit, "draws", False) for fit in self.fits)

    def shared(self) -> "FitInTurn":
        return FitInTurn(tuple(map(shared, self.fits)))

    def __call__(self, weights: Weights, stats: Stats, recipe: Recipe, key: RandomKey) -> Fitted:
        fits = []
        for fit, fit_key in zip(self.fits, jax.random.split(key, len(self.fits)), strict=True):
            fits.append(fitted := fit(weights, stats, recipe, fit_key))
            weights = tuple(fitted.transform.weights(w) for w in fitted.weights or weights)
            stats = stats.through(fitted.transform)
        return functools.reduce(Fitted.then, fits)
