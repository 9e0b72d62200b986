"""The attention of a token that is written over a key-value cache in bfloat16."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Int32

from duquantpp_jax.kernels.decode_attention import reference, triton
from duquantpp_jax.kernels.implementation import choose, why_not_nvidia

Implementation = Literal["triton", "reference"]
EVERYTHING = np.iinfo(np.int32).max
"""The window that sees all positions."""


def decode_attention(
    q: Float[Array, "rows kv_heads groups d"],
    keys: BFloat16[Array, "layers rows capacity kv_heads d"],
    values: BFloat16[Array, "layers rows capacity kv_heads d"],
    layer: Int32[Array, ""] | int,
    positions: Int32[Array, " rows"],
    *,
    scale: float,
    window: Int32[Array, ""] | int = EVERYTHING,
    implementation: Implementation | None = None,
) -> Float[Array, "rows kv_heads groups d"]:
    """softmax(q k^T scale) v over the last `window` positions up to a row's own.

    Sums are in float32. Of q in bfloat16 the weights of softmax are rounded to bfloat16 before they
    multiply the values, in "triton" before they are divided by their sum.

    >>> import jax.numpy as jnp
    >>> cached = jnp.ones((1, 2, 16, 3, 16), jnp.bfloat16)
    >>> q = jnp.ones((2, 3, 4, 16), jnp.bfloat16)
    >>> decode_attention(q, cached, cached, 0, jnp.array([0, 5]), scale=0.25).shape
    (2, 3, 4, 16)

    Args:
      q: A query of each row, for each head of keys those that share it; float32 or bfloat16.
      keys, values: Of all layers, filled as far as `positions`; read where they stand.
      implementation: "triton" (Pallas, NVIDIA: one kernel, and the sum over its runs of 256
        positions), "reference", or None for the first of these that runs here.

    Raises:
      ValueError: There is no such implementation.
      RuntimeError: The named implementation cannot run here, or not on these shapes.
    """
    obstacles = {
        "triton": lambda: why_not_nvidia() or why_not(q, keys),
        "reference": lambda: None,
    }
    name = choose("decode_attention", implementation, obstacles)
    run = {"triton": triton, "reference": reference}[name].decode_attention
    layer, window = jnp.asarray(layer, jnp.int32), jnp.asarray(window, jnp.int32)
    return run(q, keys, values, layer, positions, window, scale)


def why_not(q: Array, keys: Array) -> str | None:
    """Why the kernel is not for such a cache; None if it is."""
    (*_, d), capacity = q.shape, keys.shape[2]
    if keys.dtype != jnp.bfloat16 or q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes keys in bfloat16, and q in it or float32: got {keys.dtype} and {q.dtype}"
    if d < 16 or d & (d - 1) or capacity % 16:
        return f"heads of {d} are no power of two from 16 on, or 16 does not divide {capacity}"
    return None
