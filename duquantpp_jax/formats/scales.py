"""Scales: from the largest magnitude of a block to a power of two.

With amax = significand * 2^(e - 23) and the element's largest magnitude m * 2^emax, 1 <= m < 2:

    FLOOR        E = e - emax                                  amax / 2^E in [2^emax, 2^(emax+1))
    CEIL         E = e - emax, + 1 unless amax is a power of 2
    EVEN         FLOOR of amax rounded half up to the element's mantissa bits
    RCEIL        the least E with amax <= m * 2^(emax + E)     nothing saturates
    RCEIL_FLOAT  the least E with fl(amax * fl(1 / (m * 2^emax))) <= 2^E, as others compute RCEIL
    MSE          of FLOOR's E and its two neighbours, the one with the least squared error

E is clamped to [-127, 127] and stored as the byte E + 127. All in integers: log2 and exp2 are
inexact on CPUs, casts to float8_e8m0fnu round to nearest, and float maxima lose NaN. (RCEIL_FLOAT
has one product of normal numbers, which rounds alike everywhere.)

Source: OCP MX v1.0, section 6.3 (FLOOR); the others as compressed-tensors (EVEN), torchao (CEIL,
RCEIL) and Transformer Engine (RCEIL_FLOAT) name them, in exact form.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

from duquantpp_jax.core import Element, ElementRounding, ScaleRule, times_power_of_two
from duquantpp_jax.formats.division import magnitude_bits, split
from duquantpp_jax.formats.elements import encode
from duquantpp_jax.formats.errors import Wide, above, in_units, less, squared_error

INFINITY_BITS = 0x7F800000


def block_amax(blocks: Float32[Array, "*blocks size"]) -> UInt32[Array, "*blocks"]:
    """Bits of the largest magnitude of each block; at least INFINITY_BITS if any is not finite."""

    def larger(a: Int32[Array, ""], b: Int32[Array, ""]) -> Int32[Array, ""]:
        # max(a, b), as magnitudes have 31 bits. XLA's CPU code is vectorized for this alone.
        return b + jnp.maximum(a - b, 0)

    magnitudes = magnitude_bits(blocks).astype(jnp.int32)
    amax = jax.lax.reduce(magnitudes, np.int32(0), larger, (magnitudes.ndim - 1,))
    return amax.astype(jnp.uint32)


def clipped(
    amax: UInt32[Array, "*blocks"], clip: Float32[Array, "*#blocks"]
) -> UInt32[Array, "*blocks"]:
    """Bits of amax * clip, exact where clip is 1; at least INFINITY_BITS where not finite."""
    exponent, significand = split(amax)
    product = times_power_of_two(significand.astype(jnp.float32) * clip, exponent - 23)
    return magnitude_bits(product)


def scale_exponent(
    amax: UInt32[Array, "*blocks"], rule: ScaleRule, element: Element
) -> Int32[Array, "*blocks"]:
    """Exponent E of each block's scale, not yet clamped, for the rules that need only amax.

    Args:
      amax: Bits of the largest magnitude of the block, in the units of x; finite.
      rule: Any but MSE, for which this is FLOOR, where its search starts.
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
        case ScaleRule.RCEIL_FLOAT:
            return _float_rceil(exponent, significand, element)
    return floor + up.astype(jnp.int32)


def _float_rceil(
    exponent: Int32[Array, "*blocks"], significand: Int32[Array, "*blocks"], element: Element
) -> Int32[Array, "*blocks"]:
    """ceil(log2 r) with r = fl(amax * fl(1 / max)), as on machines that keep subnormals."""
    product = significand.astype(jnp.float32) * jnp.float32(1 / element.max)
    product_exponent, product_significand = split(magnitude_bits(product))
    floor = exponent - 23 + product_exponent
    # Of a subnormal r in [2^-127, 2^-126) the last of these bits is rounded off: a tie, to even.
    lost = (floor == -127).astype(jnp.int32)
    return floor + (product_significand > (1 << 23) + lost).astype(jnp.int32)


def clamp(exponent: Int32[Array, "*blocks"]) -> Int32[Array, "*blocks"]:
    """E in [-127, 127], the exponents that E8M0 has."""
    return jnp.clip(exponent, -127, 127)


def least_error_exponent(
    blocks: Float32[Array, "*blocks size"],
    floor: Int32[Array, "*#blocks"],
    element: Element,
    rounding: ElementRounding,
) -> Int32[Array, "*blocks"]:
    """MSE: of floor - 1, floor and floor + 1, each clamped, the exponent with the least squared
    error of the block; of equals the larger.

    Args:
      blocks: Finite numbers.
      floor: FLOOR's exponent, of amax or of a clipped amax.
      element: The element type.
      rounding: As the elements will be rounded; to nearest if that is stochastic.
    """
    if rounding is ElementRounding.STOCHASTIC:
        rounding = ElementRounding.NEAREST_EVEN
    unit = above(block_amax(blocks))[..., None]
    x = in_units(blocks, unit)

    def error(exponent: Int32[Array, "*blocks"]) -> Wide:
        codes = encode(blocks, exponent[..., None], element, rounding)
        return squared_error(x, element.decode(codes, exponent[..., None] - unit))

    best = clamp(clamp(floor) + 1)
    least = error(best)
    for step in (0, -1):
        candidate = clamp(clamp(floor) + step)
        its = error(candidate)
        better = less(its, least)
        best = jnp.where(better, candidate, best)
        least = (jnp.where(better, its[0], least[0]), jnp.where(better, its[1], least[1]))
    return best
