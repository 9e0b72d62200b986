"""Arithmetic with gradients of its own: rounding, and products of what is rounded.

Gradients pass through rounding to the numbers and to the scales of their blocks. With q = s e the
rounded value of x, s its block's scale and e its element,

    dq/dx = 1 where x lies in the block's range, 0 beyond;
    dq/d(log s) = q - x where x lies in the range, q beyond,

the second because rounding passes straight through in q = s round(x / s). A power of two has no
derivative; log s is taken to follow log(amax) + log(clip) + offset log 2 with slope one, as it does
on average over where amax lies between two powers of two.

Source: straight-through, Bengio et al., arXiv 1308.3432; the scale's gradient, Esser et al.,
LSQ, arXiv 1902.08153.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from duquantpp_jax.core import Format
from duquantpp_jax.models.products import LINEAR, narrow


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def learnable_quantize(
    format: Format,
    through_amax: bool,
    x: Float[Array, "*batch k"],
    log_scale: Float[Array, "*offsets"] | None = None,
    log_clip: Float[Array, "*clips"] | None = None,
) -> Float[Array, "*batch k"]:
    """x rounded to the format, whose scales are powers of two.

    Args:
      through_amax: Whether the largest magnitude of a block gets the gradient of its scale.
      log_scale: Learned offset of each block's log2 scale, one for each block of the last axes;
        rounded to an integer where it is applied.
      log_clip: Learned logarithm of the clip, one for each of the same blocks, or one for all.
    """
    return _forward(format, through_amax, x, log_scale, log_clip)[0]


def _forward(
    format: Format, through_amax: bool, x: Array, log_scale: Array | None, log_clip: Array | None
):
    del through_amax
    options = {} if log_scale is None else {"scale_offset": integer(log_scale)}
    if log_clip is not None:
        options["clip"] = jnp.exp(log_clip)
    rounded = format.encode(x, **options)
    q = rounded.dequantize()
    return q, (x, q, jnp.abs(x) <= rounded.limit(), log_scale, log_clip)


def _backward(format: Format, through_amax: bool, kept, g: Array):
    x, q, inside, log_scale, log_clip = kept
    along = jnp.where(inside, q - x, q) * g
    blocks = (*x.shape[:-1], -1, format.block_size)
    along = jnp.sum(along.reshape(blocks), axis=-1)
    g_x = jnp.where(inside, g, jnp.zeros_like(g))
    if through_amax:
        magnitude = jnp.abs(x.reshape(blocks))
        amax = jnp.max(magnitude, axis=-1, keepdims=True)
        largest = magnitude == amax
        share = (along / jnp.maximum(jnp.sum(largest, axis=-1), 1).astype(x.dtype))[..., None]
        safe = jnp.where(amax > 0, amax, jnp.ones_like(amax))
        to_largest = jnp.where(largest, share * jnp.sign(x.reshape(blocks)) / safe, 0.0)
        g_x = g_x + to_largest.reshape(x.shape)
    to_scale = None if log_scale is None else _summed(along, log_scale) * np.float32(np.log(2))
    return g_x, to_scale, None if log_clip is None else _summed(along, log_clip)


def _summed(along: Array, like: Array) -> Array:
    """Summed over all that share a number of `like`."""
    summed = jnp.sum(along, axis=tuple(range(along.ndim - like.ndim)), dtype=like.dtype)
    alone = tuple(axis for axis, size in enumerate(like.shape) if size == 1)
    return jnp.sum(summed, axis=alone, keepdims=True)


learnable_quantize.defvjp(_forward, _backward)


def integer(log_scale: Float[Array, "*offsets"]) -> Array:
    """The offset that is applied."""
    return jnp.round(log_scale).astype(jnp.int32)


@jax.custom_vjp
def product(x: Float[Array, "*tokens k"], w: Float[Array, "n k"]) -> Float[Array, "*tokens n"]:
    """x @ w^T with bfloat16 factors and float32 sums, forward and backward."""
    return narrow(LINEAR, x, w)


def _product_forward(x: Array, w: Array):
    return product(x, w), (x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))


def _product_backward(kept, g: Array) -> tuple[Array, Array]:
    x, w = kept
    g_rows, x_rows = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    return narrow("...n,nk->...k", g, w), narrow("tn,tk->nk", g_rows, x_rows)


product.defvjp(_product_forward, _product_backward)
