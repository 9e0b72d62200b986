"""One pass over bfloat16 x: a block of 16 words, two numbers a word, becomes 16 bytes and a scale.

With z = x / 2^E, the float32 z * 2^-126 has an exponent field one below that of E2M1. So elements
below 1, which are subnormal in E2M1, are subnormal in float32 too, and the code is these bits,
rounded to nearest even at bit 22. The product is exact where it matters: bfloat16 has 8 bits, and
none of them reaches 2^-149 unless |z| is so small that its code is 0. There are two factors, since
2^(-E-126) and partial products are not always normal numbers. GPUs keep subnormals. CPUs flush
them, so interpreting this on a CPU is right only for blocks of elements that are 0 or at least 1.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.formats.division import power_of_two
from duquantpp_jax.kernels.quantize_pack.reference import Packed

ROWS = 512  # blocks of 32 in a program
RAISED_ABOVE = {  # largest mantissa of amax at which the rule still has FLOOR's E
    ScaleRule.FLOOR: 0x7FFFFF,
    ScaleRule.CEIL: 0,
    ScaleRule.EVEN: 0x5FFFFF,
    ScaleRule.RCEIL: 0x400000,
}


def quantize_pack(
    x: BFloat16[Array, "*batch k"], rule: ScaleRule, *, interpret: bool = False
) -> Packed:
    """Packed codes and scale bytes."""
    from jax.experimental.pallas import triton as plt

    *batch, k = x.shape
    if k % 32:
        raise ValueError(f"a width of {k} is not a multiple of block 32: pad to {-(-k // 32) * 32}")
    words = lax.bitcast_convert_type(x.reshape(-1, 16, 2), jnp.uint32)
    count = words.shape[0]
    if count == 0:
        return jnp.zeros((*batch, k // 2), jnp.uint8), jnp.zeros((*batch, k // 32), jnp.uint8)
    rows = math.gcd(count, ROWS)
    whole, each = pl.BlockSpec((rows, 16), lambda i: (i, 0)), pl.BlockSpec((rows,), lambda i: (i,))
    packed, scale_bytes = pl.pallas_call(
        functools.partial(_kernel, RAISED_ABOVE[rule]),
        grid=(count // rows,),
        in_specs=[whole],
        out_specs=[whole, each],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.uint8) for shape in ((count, 16), (count,))],
        compiler_params=plt.CompilerParams(num_warps=8 if rows == ROWS else 4, num_stages=1),
        interpret=interpret,
    )(words)
    return packed.reshape(*batch, k // 2), scale_bytes.reshape(*batch, k // 32)


def _kernel(raised_above: int, words: Any, packed: Any, scale_bytes: Any) -> None:
    both = words[...]  # the lower index in the lower half
    low, high = both << 16, both & jnp.uint32(0xFFFF0000)
    larger = jnp.maximum(low & jnp.uint32(0x7FFFFFFF), high & jnp.uint32(0x7FFFFFFF))
    amax = jnp.max(larger.astype(jnp.int32), axis=1)
    bad = amax >= 0x7F800000
    raised = ((amax & 0x7FFFFF) > raised_above).astype(jnp.int32)
    exponent = jnp.where(bad, 0, jnp.maximum((amax >> 23) - 129 + raised, -127))
    power = -126 - exponent
    factors = [power_of_two(p)[:, None] for p in (power >> 1, power - (power >> 1))]
    kept = jnp.where(bad, 0x88, 0xFF).astype(jnp.uint32)[:, None]
    packed[...] = ((_code(low, factors) | _code(high, factors) << 4) & kept).astype(jnp.uint8)
    scale_bytes[...] = jnp.where(bad, 255, exponent + 127).astype(jnp.uint8)


def _code(bits: Array, factors: list[Array]) -> Array:
    scaled = lax.bitcast_convert_type(bits, jnp.float32) * factors[0] * factors[1]
    magnitude = lax.bitcast_convert_type(scaled, jnp.uint32) & jnp.uint32(0x7FFFFFFF)
    rounded = (magnitude + jnp.uint32(0x1FFFFF) + ((magnitude >> 22) & 1)) >> 22
    return jnp.minimum(rounded, jnp.uint32(7)) | (bits >> 31) << 3
