"""The reference: the scores of all pairs, and their softmax."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from duquantpp_jax.models.attention import causal_attention


def flash_attention(
    q: Float[Array, "rows length kv_heads groups d"],
    k: Float[Array, "rows keys kv_heads d"],
    v: Float[Array, "rows keys kv_heads d"],
    first: Int32[Array, " rows"],
    window: Int32[Array, ""],
    sinks: Float[Array, "kv_heads groups"] | None,
    scale: float,
) -> Float[Array, "rows length kv_heads groups d"]:
    """softmax(q k^T scale) v over the last `window` keys up to a query's own, from `first` on."""
    positions = first[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)
    return causal_attention(q, k, v, positions, window, scale**-2, sinks)
