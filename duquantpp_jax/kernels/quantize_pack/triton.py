"""One pass over bfloat16 x: 16 words of two numbers, a block, become 16 bytes and a scale."""

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
from duquantpp_jax.kernels.block_scale import RAISED_ABOVE, code, magnitude, pair, scale_of
from duquantpp_jax.kernels.quantize_pack.reference import Packed

ROWS = 512  # blocks of 32 in a program


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
    halves = both << 16, both & jnp.uint32(0xFFFF0000)
    low, high = (magnitude(lax.bitcast_convert_type(bits, jnp.float32)) for bits in halves)
    exponent, bad = scale_of(jnp.max(jnp.maximum(low, high), axis=1), raised_above)
    kept = jnp.where(bad, jnp.uint32(0x80000000), jnp.uint32(0xFFFFFFFF))[:, None]
    power = power_of_two(-exponent)[:, None]
    low, high = (
        code(lax.bitcast_convert_type(bits & kept, jnp.float32) * power) for bits in halves
    )
    packed[...] = pair(low, high).astype(jnp.uint8)
    scale_bytes[...] = jnp.where(bad, 255, exponent + 127).astype(jnp.uint8)
