"""Weights fitted to what the float model does, on what the quantized model gives them.

Layer by layer and site by site, all before it already quantized: with x the float model's input of
a linear, X^ the quantized model's, moved and rounded, and W' the moved weight,

    W* = W' + D^T X^ (X^^T X^ + damping)^-1,      D = x W^T + (r - r^) - X^ W'^T,

the ridge regression that brings the output X^ W*^T nearest to the float one; r - r^ is how far the
residual stream has drifted, for the linears that write to it, 0 for others. W* is then rounded
with the Gram matrix X^^T X^, by GPTQ say. No gradient is taken.

Source: asymmetric calibration as in GPTAQ, arXiv 2504.02692; here solved in closed form.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from duquantpp_jax.core import Fitted, Format, Recipe, Stats
from duquantpp_jax.models import SITES, Decoder, dense
from duquantpp_jax.ptq.site import (
    HIGHEST,
    QuantizedLinear,
    QuantizedSite,
    layer_of,
    pad_channels,
    quantize_input,
    quantize_linear,
)
from duquantpp_jax.rounding.gptq import damped

WRITERS = ("attention_out", "mlp_out")
"""Sites whose linear writes to the residual stream."""


def quantize_asymmetric(
    model: Decoder,
    recipe: Recipe,
    rows: Integer[np.ndarray, "rows length"],
    fits: Mapping[str, Fitted],
    *,
    damping: float = 0.1,
    drift: float = 1.0,
    batch_rows: int = 16,
) -> dict[str, QuantizedSite]:
    """Quantizes every site of every layer.

    Args:
      model: The float model.
      recipe: For its rounding and formats.
      rows: Token ids to calibrate on.
      fits: What moves each site, stacked over layers; weights that they hold are not used.
      damping: Of the regression, in units of the mean diagonal of X^^T X^.
      drift: Share of r - r^ that the writers make good.
      batch_rows: Rows that run at once.
    """
    layers = model.config.num_hidden_layers
    format = recipe.activation_format
    weights = {site: model.weights(site) for site in SITES}
    states: dict[str, QuantizedSite] = {}
    for site, fitted in fits.items():  # placeholders, of the form that each site will have
        nothing = _stats(jnp.zeros((fitted_width(fitted),) * 2), 1)
        states[site] = jax.vmap(lambda w, f, n=nothing: quantize_linear(recipe, w, n, f, n))(
            weights[site], fits[site]
        )
    done = {site: jnp.zeros(layers, bool) for site in SITES}
    for layer in range(layers):
        for site in SITES:
            sums = None
            for first in range(0, len(rows), batch_rows):
                batch = jnp.asarray(rows[first : first + batch_rows])
                part = _moments(
                    model,
                    states,
                    done,
                    fits,
                    batch,
                    jnp.int32(layer),
                    jnp.float32(drift),
                    site=site,
                    format=format,
                )
                sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
            if sums is None:
                raise ValueError("asymmetric calibration has no rows: give at least one")
            stats = _stats(sums[0], rows.size)
            fitted = layer_of(fits[site], layer)
            moved = _regress(layer_of(weights[site], layer), fitted, *sums, jnp.float32(damping))
            given = Fitted(fitted.transform, moved, fitted.clip, fitted.scale_offset)
            one = quantize_linear(recipe, moved, stats, given, stats)
            states[site] = jax.tree.map(
                lambda all, new, layer=layer: all.at[layer].set(new), states[site], one
            )
            done[site] = done[site].at[layer].set(True)
    return states


def fitted_width(fitted: Fitted) -> int:
    """Width of a site, from its transform's blocks stacked over layers.

    Raises:
      ValueError: The transform is not made of blocks.
    """
    shape = jax.tree.leaves(fitted.transform)[-1].shape
    if len(shape) != 4:
        raise ValueError(
            f"{type(fitted.transform).__name__} is not made of blocks of channels: asymmetric "
            "calibration takes transforms that are"
        )
    return shape[1] * shape[2]


def _stats(gram: Float[Array, "k k"], tokens: int) -> Stats:
    width = gram.shape[0]
    empty = Stats.init(width, 1, 1)
    return dataclasses.replace(empty, gram=gram, count=jnp.int32(tokens))


@jax.jit
def _regress(weights: Any, fitted: Fitted, gram: Array, cross: Any, damping: Array) -> Any:
    """W* in the original space: W, moved, plus the regression, moved back."""
    transform = fitted.transform
    h = damped(gram, damping)
    back = transform.inverse()
    return tuple(
        back.weights(
            transform.weights(pad_channels(w, gram.shape[0]))
            + jax.scipy.linalg.solve(h, c.T, assume_a="pos").T
        )
        for w, c in zip(weights, cross, strict=True)
    )


@functools.partial(jax.jit, static_argnames=("site", "format"))
def _moments(
    model: Decoder,
    states: Mapping[str, QuantizedSite],
    done: Mapping[str, Bool[Array, " layers"]],
    fits: Mapping[str, Fitted],
    batch: Integer[Array, "rows length"],
    layer: Int[Array, ""],
    drift: Float[Array, ""],
    *,
    site: str,
    format: Format,
) -> tuple[Float[Array, "k k"], tuple[Float[Array, "n k"], ...]]:
    """X^^T X^ and D^T X^ of one batch."""
    quantized = QuantizedLinear(format)

    def exact(name: str, x: Array, weights: Any, state: Any) -> tuple[Any, Any]:
        ys, _ = dense(name, x, weights, None)
        return ys, (x if name == site else None, ys[0] if name in WRITERS else None)

    def partly(name: str, x: Array, weights: Any, state: Any) -> tuple[Any, Any]:
        state, done, fitted = state
        rounded, _ = quantized(name, x, weights, state)
        ys, _ = dense(name, x, weights, None)
        ys = tuple(jnp.where(done, a, b) for a, b in zip(rounded, ys, strict=True))
        wide = jax.tree.leaves(fitted.transform)[-1].shape
        x = quantize_input(pad_channels(x, wide[0] * wide[1]), fitted, format)
        return ys, (x if name == site else None, ys[0] if name in WRITERS else None)

    both = {name: (states[name], done[name], fits[name]) for name in SITES}
    _, float_outs = model(batch, exact)
    _, outs = model(batch, partly, both)
    x, x_hat = (o[site][0][layer] for o in (float_outs, outs))
    fitted = jax.tree.map(lambda leaf: leaf[layer], fits[site])
    x_hat = x_hat.reshape(-1, x_hat.shape[-1])
    x = x.reshape(-1, x.shape[-1])
    drifted = jnp.zeros((), jnp.float32)
    if site in WRITERS:
        earlier = (jnp.arange(done[site].shape[0]) < layer).astype(jnp.float32)
        drifts = {name: float_outs[name][1] - outs[name][1] for name in WRITERS}
        both_drifts = drifts[WRITERS[0]] + drifts[WRITERS[1]]
        drifted = jnp.einsum("lrtn,l->rtn", both_drifts, earlier)
        if site == "mlp_out":
            drifted = drifted + drifts["attention_out"][layer]
        drifted = drift * drifted.reshape(-1, drifted.shape[-1])

    def cross(w: Array) -> Array:
        moved = fitted.transform.weights(pad_channels(w, x_hat.shape[-1]))
        d = _mm(x, w.T) - _mm(x_hat, moved.T) + drifted
        return _mm(d.T, x_hat)

    return _mm(x_hat.T, x_hat), tuple(cross(w[layer]) for w in model.weights(site))


def _mm(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    return jnp.matmul(a, b, precision=HIGHEST)
