"""Scales: from the largest magnitude of a block to a power of two.

With amax = significand * 2^(e - 23) and the element's largest magnitude m * 2^emax, 1 <= m < 2:

    FLOOR   E = e - emax                                  amax / 2^E in [2^emax, 2^(emax+1))
    CEIL    E = e - emax, + 1 unless amax is a power of 2
    EVEN    FLOOR of amax rounded half up to the element's mantissa bits
    RCEIL   the least E with amax <= m * 2^(emax + E)     nothing saturates
    MSE     of FLOOR's E and its two neighbours, the one with the least squared error

E is clamped to [-127, 127] and stored as the byte E + 127. All in integers: log2 and exp2 are
inexact on CPUs, casts to float8_e8m0fnu round to nearest, and float maxima lose NaN.

Source: OCP MX v1.0, section 6.3 (FLOOR); the others as compressed-tensors (EVEN) and torchao
(CEIL, RCEIL) name them, in exact form.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

from duquantpp_jax.core import Element, ScaleRule, times_power_of_two
from duquantpp_jax.formats.elements import encode, magnitude_bits, split

INFINITY_BITS = 0x7F800000


def block_amax(blocks: Float32[Array, "*blocks size"]) -> UInt32[Array, "*blocks"]:
    """Bits of the largest magnitude of each block; at least INFINITY_BITS if any is not finite."""
    return jnp.max(magnitude_bits(blocks), axis=-1, initial=0)


def scale_exponent(
    amax: UInt32[Array, "*blocks"], rule: ScaleRule, element: Element
) -> Int32[Array, "*blocks"]:
    """Exponent E of each block's scale, not yet clamped, for the rules that need only amax.

    Args:
      amax: Bits of the largest magnitude of the block, in the units of x; finite.
      rule: FLOOR, CEIL, EVEN or RCEIL; MSE starts from FLOOR.
      element: The element type.

    Returns:
      E; for a zero block an exponent below -127.
    """
    exponent, significand = split(amax)
    floor = exponent - element.emax
    one = 1 << 23  # significands lie in [one, 2 one)
    ulp = one >> element.mantissa_bits
    match rule:
        case ScaleRule.FLOOR | ScaleRule.MSE:
            return floor
        case ScaleRule.CEIL:
            up = significand > one
        case ScaleRule.EVEN:
            up = significand >= 2 * one - ulp // 2
        case ScaleRule.RCEIL:
            up = significand > element.max_significand * ulp
    return floor + up.astype(jnp.int32)


def clamp(exponent: Int32[Array, "*blocks"]) -> Int32[Array, "*blocks"]:
    """E in [-127, 127], the exponents that E8M0 has."""
    return jnp.clip(exponent, -127, 127)


def least_error_exponent(
    blocks: Float32[Array, "*blocks size"], floor: Int32[Array, "*blocks"], element: Element
) -> Int32[Array, "*blocks"]:
    """MSE: of floor - 1, floor and floor + 1 the exponent with the least squared error of the
    block; of equals the larger.

    Errors are measured in units of FLOOR's scale, so that none under- or overflows.
    """
    base = clamp(floor)
    unit = times_power_of_two(_normal(blocks), -base[..., None])

    def error(step: int) -> Float32[Array, "*blocks"]:
        exponent = clamp(base + step)[..., None]
        values = element.values(element.store(encode(blocks, exponent, element)))
        rounded = times_power_of_two(values, exponent - base[..., None])
        return jnp.sum(jnp.square(unit - rounded), axis=-1)

    best, least = clamp(base + 1), error(1)
    for step in (0, -1):
        other = error(step)
        best = jnp.where(other < least, clamp(base + step), best)
        least = jnp.minimum(other, least)
    return best


def _normal(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    # Float arithmetic flushes subnormal inputs anyway; this says so.
    return jnp.where(magnitude_bits(x) < 0x800000, jnp.float32(0), x)
