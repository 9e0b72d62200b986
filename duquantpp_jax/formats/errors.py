"""Squared error of a block as an exact integer sum, so that two errors compare exactly.

    error = sum_i (x_i - q_i)^2       in units in which every |x_i| < 1

A float sum depends on the order of its terms and on where the compiler fuses multiply and add. Both
change with jit, vmap and sharding, so that another scale could win. Here each square is rounded to
float32, cut off at 2^-2b and added as an integer.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from duquantpp_jax.core.arrays import times_power_of_two
from duquantpp_jax.formats.division import magnitude_bits, split

Wide = tuple[Int32[Array, "*blocks"], Int32[Array, "*blocks"]]
"""A number as a high and a low part, each of b bits."""


def in_units(
    x: Float32[Array, "*blocks size"], amax: UInt32[Array, "*blocks"]
) -> tuple[Float32[Array, "*blocks size"], Int32[Array, "*blocks 1"]]:
    """|x| / 2^u with 2^u the power of two next above amax, and u; for finite x, also subnormal."""
    exponent, significand = split(magnitude_bits(x))
    unit = split(amax)[0][..., None] + 1
    return times_power_of_two(significand.astype(jnp.float32), exponent - 23 - unit), unit


def squared_error(x: Float32[Array, "*blocks size"], q: Float32[Array, "*blocks size"]) -> Wide:
    """Sum over each block of (|x| - |q|)^2, for |x| < 1 and differences below 1."""
    bits = 30 - (x.shape[-1] - 1).bit_length()  # b: sums over the block fit into 31 bits
    square = jnp.square(jnp.abs(x) - jnp.abs(q)) * 2.0**bits
    high = square.astype(jnp.int32)
    low = ((square - high.astype(jnp.float32)) * 2.0**bits).astype(jnp.int32)
    high, low = jnp.sum(high, axis=-1), jnp.sum(low, axis=-1)
    return high + (low >> bits), low & ((1 << bits) - 1)


def less(a: Wide, b: Wide) -> Bool[Array, "*blocks"]:
    """a < b."""
    return (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
