"""Rounding to the elements of a minifloat, in integers.

A float32 magnitude is significand * 2^(e - 23) with a 24-bit significand. Scaled by 2^-E its
exponent is q = e - E, and the minifloats there are 2^(max(q, emin) - mantissa_bits), the quantum,
apart. So the code of the rounded magnitude is

    (max(q, emin) - emin) * 2^mantissa_bits + round(significand / 2^shift),
    shift = 23 - mantissa_bits + max(0, emin - q).

Codes are ordered like their values, so a carry of the rounding gives the next exponent. To round,
add to the significand and cut off its lowest bits; added is

    NEAREST_EVEN   half a quantum less a bit, and the bit that decides a tie
    AWAY           half a quantum
    TOWARD_ZERO    nothing
    STOCHASTIC     a random number below a quantum

There is no float arithmetic: CPUs flush subnormals, and casts from float64 round twice.

Source of the element types: OCP Microscaling Formats (MX) v1.0, section 5.3.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Key, UInt8, UInt32

from duquantpp_jax.core import Element, ElementRounding
from duquantpp_jax.formats.division import magnitude_bits, split

E2M1 = Element("e2m1", 2, 1, bias=1, max_code=0b111, dtype=jnp.float4_e2m1fn)
E2M3 = Element("e2m3", 2, 3, bias=1, max_code=0b11111, dtype=jnp.uint8)
E3M2 = Element("e3m2", 3, 2, bias=3, max_code=0b11111, dtype=jnp.uint8)
E4M3 = Element("e4m3", 4, 3, bias=7, max_code=0x7E, dtype=jnp.float8_e4m3fn)
E5M2 = Element("e5m2", 5, 2, bias=15, max_code=0x7B, dtype=jnp.float8_e5m2, infinity_code=0x7C)


def encode(
    x: Float32[Array, "*shape"],
    scale_exponent: Int32[Array, "*#shape"],
    element: Element,
    rounding: ElementRounding = ElementRounding.NEAREST_EVEN,
    key: Key[Array, ""] | None = None,
) -> UInt8[Array, "*shape"]:
    """Codes of x / 2^scale_exponent, rounded and saturated; zeros too keep their sign.

    Args:
      x: Finite numbers. The codes of NaN and Inf have no meaning.
      scale_exponent: Of magnitude below 2^10.
      key: For STOCHASTIC. Where x does not saturate, the expectation of the rounded x is
        x / 2^scale_exponent to 2^-31 of a quantum.
    """
    exponent, significand = split(magnitude_bits(x))
    scaled = exponent - scale_exponent
    shift = 23 - element.mantissa_bits + jnp.maximum(0, element.emin - scaled)
    significand = significand.astype(jnp.uint32)
    rounded = _round_off(significand, shift.astype(jnp.uint32), rounding, key).astype(jnp.int32)
    above = jnp.maximum(scaled, element.emin) - element.emin
    code = jnp.minimum((above << element.mantissa_bits) + rounded, element.max_code)
    negative = jax.lax.bitcast_convert_type(x, jnp.uint32) >> 31
    return (code.astype(jnp.uint32) | negative << (element.bits - 1)).astype(jnp.uint8)


def _round_off(
    significand: UInt32[Array, "*shape"], shift: Array, rounding: ElementRounding, key: Array | None
) -> UInt32[Array, "*shape"]:
    """significand / 2^shift as an integer."""
    if rounding is ElementRounding.STOCHASTIC:
        if key is None:
            raise ValueError("stochastic rounding needs a key: give key=jax.random.key(seed)")
        # There are 31 random bits; bits of the significand below them are cut off.
        excess = jnp.maximum(shift, 31) - 31
        significand = jnp.where(excess < 24, significand >> jnp.minimum(excess, 24), 0)
        shift = jnp.minimum(shift, 31)
        random = jax.random.bits(key, significand.shape, jnp.uint32) & ((1 << shift) - 1)
        return (significand + random) >> shift
    shift = jnp.minimum(shift, 25)  # a significand has 24 bits: from 25 on all round to zero
    half = jnp.uint32(1) << (shift - 1)
    match rounding:
        case ElementRounding.NEAREST_EVEN:
            added = half - 1 + (significand >> shift & 1)
        case ElementRounding.AWAY:
            added = half
        case ElementRounding.TOWARD_ZERO:
            added = jnp.zeros_like(half)
    return (significand + added) >> shift
