"""The reference: the layer's slice of the cache, and attention over all of its positions."""

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int32

from duquantpp_jax.models.attention import causal_attention


def decode_attention(
    q: Float[Array, "rows kv_heads groups d"],
    keys: BFloat16[Array, "layers rows capacity kv_heads d"],
    values: BFloat16[Array, "layers rows capacity kv_heads d"],
    layer: Int32[Array, ""],
    positions: Int32[Array, " rows"],
    window: Int32[Array, ""],
    scale: float,
) -> Float[Array, "rows kv_heads groups d"]:
    """softmax(q k^T scale) v over the last `window` positions up to a row's own."""
    k, v = (cached[layer].astype(q.dtype) for cached in (keys, values))
    at = positions[:, None]
    return causal_attention(q[:, None], k, v, at, jnp.asarray(window), scale**-2)[:, 0]
