"""Elements: rounding to a minifloat, in integers.

A float32 magnitude is significand * 2^(e - 23) with a 24-bit significand. Scaled by 2^-E its
exponent is q = e - E, and the grid of the minifloat there has the quantum 2^(max(q, emin) -
mantissa_bits). So the code of the rounded magnitude is

    (max(q, emin) - emin) * 2^mantissa_bits + round(significand / 2^shift),
    shift = 23 - mantissa_bits + max(0, emin - q),

where a carry out of the rounding lands on the next exponent by itself, as codes are ordered like
the numbers they stand for. No float operation takes part: CPUs flush subnormals and casts from
float64 round twice.

Source of the element types: OCP Microscaling Formats (MX) v1.0, section 5.3.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt8, UInt32

from duquantpp_jax.core import Element

E2M1 = Element("e2m1", 2, 1, bias=1, max_code=0b111, dtype=jnp.float4_e2m1fn)
E2M3 = Element("e2m3", 2, 3, bias=1, max_code=0b11111, dtype=jnp.uint8)
E3M2 = Element("e3m2", 3, 2, bias=3, max_code=0b11111, dtype=jnp.uint8)
E4M3 = Element("e4m3", 4, 3, bias=7, max_code=0x7E, dtype=jnp.float8_e4m3fn)
E5M2 = Element("e5m2", 5, 2, bias=15, max_code=0x7B, dtype=jnp.float8_e5m2)


def magnitude_bits(x: Float32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Bits of |x|: as integers they are ordered like magnitudes, with NaN above Inf on top."""
    return jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7FFFFFFF)


def split(
    magnitude: UInt32[Array, "*shape"],
) -> tuple[Int32[Array, "*shape"], Int32[Array, "*shape"]]:
    """Exponent e and 24-bit significand of finite magnitudes, value = significand * 2^(e - 23).

    Subnormals are normalized; zero has significand 0 and an exponent below every other.
    """
    subnormal = magnitude < 0x800000
    # A subnormal's bits are its value in units of 2^-149, which as a float32 is normal.
    counted = jax.lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.uint32)
    bits = jnp.where(subnormal, counted, magnitude)
    exponent = (bits >> 23).astype(jnp.int32) - jnp.where(subnormal, 127 + 149, 127)
    significand = (bits & 0x7FFFFF | 0x800000).astype(jnp.int32)
    return exponent, jnp.where(magnitude == 0, 0, significand)


def encode(
    x: Float32[Array, "*shape"], scale_exponent: Int32[Array, "*shape"], element: Element
) -> UInt8[Array, "*shape"]:
    """Codes of x / 2^scale_exponent, rounded to nearest, ties to even, saturated; sign kept.

    Args:
      x: Finite numbers (of NaN and Inf the code means nothing).
      scale_exponent: In [-127, 127], broadcast against x.
      element: The element type.
    """
    exponent, significand = split(magnitude_bits(x))
    scaled = exponent - scale_exponent
    shift = 23 - element.mantissa_bits + jnp.maximum(0, element.emin - scaled)
    shift = jnp.minimum(shift, 25)  # a significand has 24 bits: beyond 25 all round to zero
    half_below = (1 << (shift - 1)) - 1
    rounded = (significand + half_below + ((significand >> shift) & 1)) >> shift
    above = jnp.maximum(scaled, element.emin) - element.emin
    code = jnp.minimum((above << element.mantissa_bits) + rounded, element.max_code)
    negative = jax.lax.bitcast_convert_type(x, jnp.uint32) >> 31
    return (code.astype(jnp.uint32) | negative << (element.bits - 1)).astype(jnp.uint8)
