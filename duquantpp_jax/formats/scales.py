"""Scale rules: how the largest magnitude of a block becomes a power of two.

With amax = significand * 2^(e - 23) and the element's largest magnitude m * 2^emax, 1 <= m < 2:

    FLOOR        E = e - emax                                  amax / 2^E in [2^emax, 2^(emax+1))
    CEIL         E = e - emax, + 1 unless amax is a power of 2
    EVEN         FLOOR of amax rounded half up to the element's mantissa bits
    RCEIL        the least E with amax <= m * 2^(emax + E)     nothing saturates
    RCEIL_FLOAT  the least E with fl(amax * fl(1 / (m * 2^emax))) <= 2^E, as others compute RCEIL
    MSE          of FLOOR's E and its two neighbours, the one with the least squared error

E is clamped to [-127, 127] and stored as the byte E + 127. All arithmetic is in integers: log2 and
exp2 are inexact on CPUs, casts to float8_e8m0fnu round to nearest, and float maxima lose NaN.
(RCEIL_FLOAT has a product of normal numbers, which rounds alike everywhere.)

Source: OCP MX v1.0, section 6.3 (FLOOR); the others as compressed-tensors (EVEN), torchao (CEIL,
RCEIL) and Transformer Engine (RCEIL_FLOAT) name them, in exact form.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from duquantpp_jax.core import Element, ElementRounding, ScaleRule
from duquantpp_jax.core.arrays import times_power_of_two
from duquantpp_jax.formats.division import magnitude_bits, split
from duquantpp_jax.formats.elements import encode
from duquantpp_jax.formats.errors import Wide, in_units, less, squared_error

INFINITY_BITS = 0x7F800000


def block_amax(blocks: Float32[Array, "*blocks size"]) -> UInt32[Array, "*blocks"]:
    """Bits of the largest magnitude of each block; at least INFINITY_BITS if any is not finite."""

    def larger(a: Int32[Array, ""], b: Int32[Array, ""]) -> Int32[Array, ""]:
        # max(a, b), as magnitudes have 31 bits. XLA's CPU compiler vectorizes only this form.
        return b + jnp.maximum(a - b, 0)

    magnitudes = magnitude_bits(blocks).astype(jnp.int32)
    amax = jax.lax.reduce(magnitudes, np.int32(0), larger, (magnitudes.ndim - 1,))
    return amax.astype(jnp.uint32)


def clipped_amax(
    blocks: Float32[Array, "*blocks size"], clip: Float32[Array, "*#blocks"] | None
) -> tuple[UInt32[Array, "*blocks"], Bool[Array, "*blocks"]]:
    """Bits of amax * clip of each block, exact where clip is 1, and where either is not finite."""
    amax = block_amax(blocks)
    bad = amax >= INFINITY_BITS
    if clip is not None:
        exponent, significand = split(amax)
        product = times_power_of_two(significand.astype(jnp.float32) * clip, exponent - 23)
        amax = magnitude_bits(product)
        bad = bad | (amax >= INFINITY_BITS)
    return amax, bad


def scale_exponent(
    amax: UInt32[Array, "*blocks"], rule: ScaleRule, element: Element
) -> Int32[Array, "*blocks"]:
    """Exponent E of each block's scale, not yet clamped; below -127 for a zero block.

    Args:
      amax: Bits of the largest magnitude of the block, in the units of x; finite.
      rule: For MSE this is FLOOR, where its search starts.
    """
    exponent, significand = split(amax)
    floor = exponent - element.emax
    unit = 1 << 23  # significands lie in [unit, 2 unit)
    ulp = unit >> element.mantissa_bits
    match rule:
        case ScaleRule.FLOOR | ScaleRule.MSE:
            return floor
        case ScaleRule.CEIL:
            up = significand > unit
        case ScaleRule.EVEN:
            up = significand >= 2 * unit - ulp // 2
        case ScaleRule.RCEIL:
            up = significand > element.max_significand * ulp
        case ScaleRule.RCEIL_FLOAT:
            # ceil(log2 r), r = fl(amax * fl(1 / max)), as machines compute it that keep subnormals.
            product = significand.astype(jnp.float32) * jnp.float32(1 / element.max)
            product_exponent, product_significand = split(magnitude_bits(product))
            floor = exponent - 23 + product_exponent
            # An r in [2^-127, 2^-126) has a bit less: a set last bit is a tie, rounded to even.
            lost = (floor == -127).astype(jnp.int32)
            up = product_significand > unit + lost
    return floor + up.astype(jnp.int32)


def at_least_normal(scales: Float32[Array, "*blocks"]) -> Float32[Array, "*blocks"]:
    """max(scale, 2^-126): smaller scales would be flushed to zero."""
    bits = jnp.maximum(magnitude_bits(scales), 0x00800000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def clamp(exponent: Int32[Array, "*blocks"]) -> Int32[Array, "*blocks"]:
    """E within [-127, 127], the exponents of E8M0."""
    return jnp.clip(exponent, -127, 127)


def least_error_exponent(
    blocks: Float32[Array, "*blocks size"],
    floor: Int32[Array, "*#blocks"],
    element: Element,
    rounding: ElementRounding,
) -> Int32[Array, "*blocks"]:
    """MSE: of floor - 1, floor and floor + 1, each clamped, that with the least squared error.

    Of equal errors the larger exponent is taken. `floor` is FLOOR's, of amax or a clipped amax.
    """
    x, unit = in_units(blocks, block_amax(blocks))

    def error(exponent: Int32[Array, "*blocks"]) -> Wide:
        codes = encode(blocks, exponent[..., None], element, rounding.without_key)
        return squared_error(x, element.decode(codes, exponent[..., None] - unit))

    best = clamp(clamp(floor) + 1)
    least = error(best)
    for step in (0, -1):
        candidate = clamp(clamp(floor) + step)
        found = error(candidate)
        better = less(found, least)
        best = jnp.where(better, candidate, best)
        least = (jnp.where(better, found[0], least[0]), jnp.where(better, found[1], least[1]))
    return best
