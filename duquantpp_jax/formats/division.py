"""Division in integers, because XLA may turn a / b into a * (1 / b), which rounds twice.

    magnitude = significand * 2^(exponent - 23),  2^23 <= significand < 2^24
    a / b = (significand_a / significand_b) * 2^(exponent_a - exponent_b)

XLA does so for divisions by a constant or by a broadcast array: under jit amax / 6 is not the
float32 nearest to amax / 6. Here a quotient is an integer with a remainder. Its lowest bit, the
sticky bit, is set where the remainder is not zero, so that rounding the quotient rounds a / b.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

Integers = tuple[Int32[Array, "*shape"], Int32[Array, "*shape"]]
Scaled = tuple[Float32[Array, "*shape"], Int32[Array, "*shape"]]
"""Numbers q * 2^e, as q and e."""


def magnitude_bits(x: Float32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Bits of |x|; as integers they are ordered like magnitudes, and NaN is above Inf."""
    return jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7FFFFFFF)


def power_of_two(exponent: Int32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """2^exponent, from 2^-126 to 2^127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def split(magnitude: UInt32[Array, "*shape"]) -> Integers:
    """Exponent and 24-bit significand of finite magnitudes, significand * 2^(exponent - 23).

    Subnormals are normalized. Zero has significand 0 and an exponent below all others.
    """
    subnormal = magnitude < 0x800000
    # The bits of a subnormal are an integer in units of 2^-149; as a float32 it is normal.
    counted = jax.lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.uint32)
    bits = jnp.where(subnormal, counted, magnitude)
    exponent = (bits >> 23).astype(jnp.int32) - jnp.where(subnormal, 127 + 149, 127)
    significand = (bits & 0x7FFFFF | 0x800000).astype(jnp.int32)
    return exponent, jnp.where(magnitude == 0, 0, significand)


def quotient(a: Float32[Array, "*shape"], b: Float32[Array, "*#shape"]) -> Scaled:
    """q * 2^e = a / b, for finite a and finite positive b; q has the sign of a.

    It is zero or of magnitude within (2^14, 2^16): 14 bits and a sticky bit, enough to round to any
    element.
    """
    exponent_a, significand_a = split(magnitude_bits(a))
    exponent_b, significand_b = split(magnitude_bits(b))
    reciprocal = 1 / significand_b.astype(jnp.float32)
    high, rest = _step(significand_a, significand_b, reciprocal)
    low, rest = _step(rest, significand_b, reciprocal)
    whole = (high << 8) + (low << 1) + (rest > 0).astype(jnp.int32)
    negative = jax.lax.bitcast_convert_type(a, jnp.uint32) & jnp.uint32(0x80000000)
    bits = jax.lax.bitcast_convert_type(whole.astype(jnp.float32), jnp.uint32) | negative
    return jax.lax.bitcast_convert_type(bits, jnp.float32), exponent_a - exponent_b - 15


def _step(a: Int32[Array, "*shape"], b: Array, reciprocal: Array) -> Integers:
    """Quotient and remainder of 2^7 a by b: a step of long division by seven bits."""
    guess = (a.astype(jnp.float32) * 128 * reciprocal).astype(jnp.int32)
    rest = (a << 7) - guess * b  # the guess may be off by 1: the remainder corrects it
    guess = guess + (rest >= b).astype(jnp.int32) - (rest < 0).astype(jnp.int32)
    return guess, (a << 7) - guess * b


def divide_by(magnitude: UInt32[Array, "*shape"], divisor: int) -> Scaled:
    """q * 2^e = magnitude / divisor, for finite magnitudes and divisors below 32.

    q is the nearest float32, 0 or in [1, 2^31].
    """
    exponent, significand = split(magnitude)
    shifted = significand.astype(jnp.uint32) << 7
    whole = shifted // divisor
    sticky = (whole * divisor != shifted).astype(jnp.uint32)
    return (whole | sticky).astype(jnp.float32), exponent - 30
