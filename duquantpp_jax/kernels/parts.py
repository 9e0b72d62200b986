"""A float32 as the sum of three bfloat16 numbers, exactly, inside kernels.

    x = x_1 + x_2 + x_3,     x_i the upper half of the bits of what x_1 to x_{i-1} leave
    x M = sum of x_i M_j, i + j <= 4,     but for less than 2^-24 |x| |M|

So a product in float32 is six on tensor cores, and three where one side is in bfloat16.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float

PARTS = 3


def parts_of(x: Float[Array, "*s"]) -> list[BFloat16[Array, "*s"]]:
    """Numbers of 8 bits that add up to x; x itself where it is one."""
    if x.dtype == jnp.bfloat16:
        return [x]
    found = []
    for _ in range(PARTS):
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        part = lax.bitcast_convert_type(bits, jnp.float32)
        found.append(part.astype(jnp.bfloat16))
        x = x - part
    return found
