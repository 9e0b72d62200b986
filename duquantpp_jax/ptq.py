"""Post-training quantization: the one place where fit, transform, rounding and format meet.

For the weights W of the linears that share an input x,

    transform = fit(W, Stats of x),     W^ = round(transform.weights(W)),
    y = Q(transform.activations(x)) @ W^.T

with Q the activation format. `quantize_linear` does one site, `quantize_model` all of them, and
`QuantizedLinear` computes y where a model would compute x @ W.T.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Key

from duquantpp_jax.core import Fitted, Format, MXArray, Recipe, Stats, Transform, Weights
from duquantpp_jax.transforms.block import lower

HIGHEST = jax.lax.Precision.HIGHEST


@struct.dataclass
class QuantizedSite:
    """The quantized linears of one site, or of all layers' sites stacked.

    Attributes:
      transform: Moves the input; lowered to one form where it can be.
      weights: Moved and rounded, one for each linear.
      clip, scale_offset: As in `Format.quantize`, for the activations.
    """

    transform: Transform
    weights: tuple[MXArray, ...]
    clip: Array | None = None
    scale_offset: Array | None = None


def widen(x: Float[Array, "*batch k"], width: int) -> Float[Array, "*batch width"]:
    """x with zeros appended to its last axis up to `width`.

    Zeros on both sides of a linear leave its output as it is: x @ w.T = widen(x) @ widen(w).T.
    """
    missing = width - x.shape[-1]
    return x if missing == 0 else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def fit_site(recipe: Recipe, weights: Weights, stats: Stats, key: Key[Array, ""]) -> Fitted:
    """The recipe's fit on the weights of one site, widened to the input's width."""
    width = stats.absmax.shape[-1]
    return recipe.fit(tuple(widen(w, width) for w in weights), stats, recipe, key)


def quantize_linear(
    recipe: Recipe, weights: Weights, stats: Stats, fitted: Fitted
) -> QuantizedSite:
    """Moves and rounds the linears of one site.

    Args:
      recipe: For its rounding and formats.
      weights: Of the linears that share the input, each [out, in].
      stats: Of the input, before it is moved.
      fitted: What `fit_site` gave, or any other.
    """
    width = stats.absmax.shape[-1]
    transform = fitted.transform
    moved_stats = stats.through(transform)
    return QuantizedSite(
        transform=lower(transform, width, recipe.activation_format.block_size),
        weights=tuple(
            recipe.rounding(transform.weights(widen(w, width)), recipe.weight_format, moved_stats)
            for w in fitted.weights or weights
        ),
        clip=fitted.clip,
        scale_offset=fitted.scale_offset,
    )


Fits = dict[str, list[Fitted]]
"""For each site of a layer, the fits of all layers."""


def fit_model(
    recipe: Recipe,
    weights: Mapping[str, Weights],
    stats: Mapping[str, Stats],
    key: Key[Array, ""],
) -> Fits:
    """Fits every site of every layer.

    Args:
      recipe: The method.
      weights: For each site, weights stacked over layers, each [layers, out, in].
      stats: For each site, Stats stacked over layers.
      key: For fits that draw; each site of each layer gets its own.
    """
    fits: Fits = {}
    for number, (site, stacked) in enumerate(weights.items()):
        site_key = jax.random.fold_in(key, number)
        fits[site] = [
            fit_site(
                recipe,
                tuple(w[layer] for w in stacked),
                layer_of(stats[site], layer),
                jax.random.fold_in(site_key, layer),
            )
            for layer in range(stacked[0].shape[0])
        ]
    return fits


def quantize_model(
    recipe: Recipe, weights: Mapping[str, Weights], stats: Mapping[str, Stats], fits: Fits
) -> dict[str, QuantizedSite]:
    """Quantizes every site of every layer, as `fits` has moved it.

    Returns:
      For each site, the layers' `QuantizedSite`s stacked: the state that a decoder scans.
    """
    sites = {}
    for site, stacked in weights.items():
        layers = [
            quantize_linear(
                recipe, tuple(w[layer] for w in stacked), layer_of(stats[site], layer), fitted
            )
            for layer, fitted in enumerate(fits[site])
        ]
        sites[site] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return sites


def layer_of(stacked: Any, layer: int) -> Any:
    """One layer's slice of a pytree whose arrays have a leading layer axis."""
    return jax.tree.map(lambda leaf: leaf[layer], stacked)


@dataclasses.dataclass(frozen=True)
class QuantizedLinear:
    """The `linear` of a quantized model: y = Q(transform.activations(x)) @ W^.T.

    Attributes:
      activation_format: Q; static, while everything else is in the state.
    """

    activation_format: Format

    def __call__(
        self, site: str, x: Array, weights: tuple[Array, ...], state: QuantizedSite
    ) -> tuple[tuple[Array, ...], None]:
        x = self.quantize_input(x, state)
        return tuple(_matmul(x, w.dequantize()) for w in state.weights), None

    def quantize_input(self, x: Array, state: QuantizedSite) -> Array:
        """Q(transform.activations(x)) in float32, x widened to the weights' width."""
        moved = state.transform.activations(widen(x, state.weights[0].shape[-1]))
        options = {"clip": state.clip, "scale_offset": state.scale_offset}
        given = {name: value for name, value in options.items() if value is not None}
        return self.activation_format.fake_quantize(moved, **given)


def _matmul(x: Float[Array, "*tokens k"], w: Float[Array, "n k"]) -> Float[Array, "*tokens n"]:
    return jnp.einsum("...k,nk->...n", x, w, precision=HIGHEST)
