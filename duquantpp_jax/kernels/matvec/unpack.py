"""Packed rows to bfloat16 in one pass: for many tokens, whose product is then one of bfloat16.

The float32 with an element's exponent and mantissa bits in its own lowest exponent and highest
mantissa bits is the element times 2^-126, subnormal where the element is. GPUs keep subnormals;
CPUs flush them, so interpreting this on a CPU is right only for elements that are 0 or at least 1.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Int32

from duquantpp_jax.kernels.matvec.rows import BLOCK, WORDS, PackedRows

ROWS, BLOCKS = 2, 64
"""Of a program, or half as many blocks."""


def unpacked(
    rows: PackedRows, layer: Int32[Array, ""], *, interpret: bool = False
) -> BFloat16[Array, "rows k"]:
    """The numbers of a layer, exact, of rows that are filled up, too."""
    from jax.experimental.pallas import triton as plt

    _, n, blocks = rows.scale_bytes.shape
    part = math.gcd(blocks, BLOCKS)
    pairs = pl.pallas_call(
        functools.partial(_kernel, (ROWS, part)),
        grid=(n // ROWS, blocks // part),
        in_specs=[pl.BlockSpec()] * 3,
        out_specs=pl.BlockSpec((ROWS, part * BLOCK // 2), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((n, blocks * BLOCK // 2), jnp.uint32),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(layer.reshape(1), rows.words, rows.scale_bytes)
    numbers = lax.bitcast_convert_type(pairs, jnp.bfloat16).reshape(n, blocks * BLOCK)
    return numbers[:, : rows.width]


def _kernel(sizes: tuple[int, int], layer: Any, words: Any, scale_bytes: Any, pairs: Any) -> None:
    own = layer[0]
    rows, at = (pl.ds(pl.program_id(i) * size, size) for i, size in enumerate(sizes))
    byte = scale_bytes[own, rows, at].astype(jnp.int32)
    bits = jnp.where(byte == 0, 0x400000, jnp.where(byte == 255, 0x7FC00000, byte << 23))
    scale = lax.bitcast_convert_type(bits, jnp.float32)
    # No constant: XLA multiplies a constant with the scale first, which overflows.
    unit = jnp.where(byte < 0, 0, jnp.float32(2.0**126))
    factors = [factor[:, :, None, None] for factor in (unit, scale)]
    shape = *sizes, WORDS, 4
    word = jnp.transpose(words[own, :, rows, at], (1, 2, 0))[:, :, :, None]
    two = jnp.broadcast_to(word, shape) >> (8 * lax.broadcasted_iota(jnp.uint32, shape, 3))
    low, high = (_number(two >> shift, factors) for shift in (0, 4))
    pairs[...] = ((high & jnp.uint32(0xFFFF0000)) | low >> 16).reshape(pairs.shape)


def _number(code: Array, factors: list[Array]) -> Array:
    """Bits of the element times its scale in float32, of the lowest code."""
    bits = (code & 7) << 22 | (code & 8) << 28
    number = lax.bitcast_convert_type(bits, jnp.float32) * factors[0] * factors[1]
    return lax.bitcast_convert_type(number, jnp.uint32)
