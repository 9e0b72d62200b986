"""The scale of a block and the elements in it, from the bits of float32, inside kernels.

E = floor(log2 amax) - 2, + 1 where amax's mantissa is above that of the rule
z = |y| / 2^E,      exact, but where it rounds to zero anyway

nearest    z to the next multiple of 2^(max(e, 0) - 1), e its exponent, 6 at most. Adding
           2^(e + 22) and taking it away again does that, ties to even, for there float32 has no
           bits below it
code       the bits of z 2^-126, rounded at bit 22: below 1 elements are subnormal in E2M1, and
           here in float32, so that the code is the exponent and the first bit of the mantissa.
           GPUs keep subnormals. CPUs flush them, so that there a code is right only for
           elements that are 0 or at least 1
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.formats.division import power_of_two

RAISED_ABOVE = {
    ScaleRule.FLOOR: 0x7FFFFF,
    ScaleRule.CEIL: 0,
    ScaleRule.EVEN: 0x5FFFFF,
    ScaleRule.RCEIL: 0x400000,
}
"""Largest mantissa of amax at which the rule still has FLOOR's E."""


def magnitude(y: Float32[Array, "*s"]) -> Int32[Array, "*s"]:
    """Bits of |y|; those of a block have a maximum in which NaN is not lost."""
    return lax.bitcast_convert_type(y, jnp.int32) & 0x7FFFFFFF


def scale_of(
    amax: Int32[Array, "*blocks"], raised_above: int
) -> tuple[Int32[Array, "*blocks"], Bool[Array, "*blocks"]]:
    """E of each block, 0 where it is bad, and whether it is: it has NaN or Inf.

    Args:
      amax: Bits of the largest magnitude of the block.
      raised_above: Of RAISED_ABOVE.
    """
    bad = amax >= 0x7F800000
    raised = ((amax & 0x7FFFFF) > raised_above).astype(jnp.int32)
    return jnp.where(bad, 0, jnp.maximum((amax >> 23) - 129 + raised, -127)), bad


def nearest(z: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """The E2M1 number next to 0 <= z < 8."""
    binade = jnp.maximum(lax.bitcast_convert_type(z, jnp.int32) & 0x7F800000, 0x3F800000)
    added = lax.bitcast_convert_type(binade + (22 << 23), jnp.float32)
    return jnp.minimum(z + added - added, 6)


def with_sign(magnitude: Float32[Array, "*s"], y: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """A number with the sign of y, which may be a zero's."""
    sign = lax.bitcast_convert_type(y, jnp.int32) & -0x80000000
    return lax.bitcast_convert_type(lax.bitcast_convert_type(magnitude, jnp.int32) | sign, y.dtype)


def code(z: Float32[Array, "*s"]) -> UInt32[Array, "*s"]:
    """The E2M1 code next to |z| < 8, with the sign of z in bit 9 and 8 where it is to be 7."""
    bits = lax.bitcast_convert_type(z * power_of_two(jnp.int32(-126)), jnp.uint32)
    return (bits + jnp.uint32(0x1FFFFF) + (bits >> 22 & 1)) >> 22


def pair(low: UInt32[Array, "*s"], high: UInt32[Array, "*s"]) -> UInt32[Array, "*s"]:
    """Two of `code` as a byte; of NaN and Inf it has no meaning."""
    both = halves(low, high)
    return (both | both >> 12) & 0xFF


def halves(low: UInt32[Array, "*s"], high: UInt32[Array, "*s"]) -> UInt32[Array, "*s"]:
    """Two of `code`, in the lowest bits of either half; of NaN and Inf it has no meaning."""
    both = low | high << 16
    both -= both >> 3 & 0x00010001
    return (both | both >> 6) & 0x000F000F
