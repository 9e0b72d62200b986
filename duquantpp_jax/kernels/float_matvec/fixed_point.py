"""Tokens in fixed point: the numbers of a block as 32-bit integers with a power of two in common.

x_bj = X_bj 2^(E_b - 31)         2^E_b > max |x_b|, the least such power, X_bj cut off

A float32 has 24 bits, so X is exact for a number of at least 2^-7 times the block's largest, and a
bfloat16 of 2^-23 times; any other is off by less than 2^(E_b - 31). An integer is four bytes,
of which the highest has the sign:

X = sum_l 2^(8 l) X_l            0 <= X_l < 256 for l < 3, and -128 <= X_3 < 128
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32, Int32, UInt32

from duquantpp_jax.formats.division import power_of_two
from duquantpp_jax.kernels.block_scale import magnitude
from duquantpp_jax.kernels.matvec import move
from duquantpp_jax.kernels.matvec.rows import PackedRows
from duquantpp_jax.models.prologue import Prologue

BYTES = 4
"""Bytes of an integer."""
NOT_FINITE = 1 << 20
"""E of a block that has NaN or Inf."""
BLOCKS = 2
"""Blocks of a program."""
LARGEST = 12
"""What a weight's byte has more than twice the weight: so much is to be taken from a sum."""


def fixed(
    x: Float32[Array, "*blocks 32"], bits: int = 24
) -> tuple[Int32[Array, "*blocks 32"], Int32[Array, "*blocks"]]:
    """X of each number, and E of each block, at least -95: below 2^-126 numbers are lost.

    Args:
      bits: Significant ones of x: 24, or 8 to round it to bfloat16 before.
    """
    amax = jnp.max(magnitude(x), axis=-1)
    bad = amax >= 0x7F800000
    if bits == 8:
        x, amax = _narrow(lax.bitcast_convert_type(x, jnp.int32)), _narrow(amax)
        x, bad = lax.bitcast_convert_type(x, jnp.float32), bad | (amax >= 0x7F800000)
    exponent = jnp.maximum((amax >> 23) - 126, -95)
    shift = jnp.where(bad, 0, 31 - exponent)[..., None]
    scaled = x * power_of_two(shift >> 1) * power_of_two(shift - (shift >> 1))
    whole = jnp.where(bad[..., None], jnp.float32(0), scaled).astype(jnp.int32)
    return whole, jnp.where(bad, NOT_FINITE, exponent)


def _narrow(bits: Int32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Bits of the bfloat16 next to a float32, to even, which XLA does not leave out as it may do
    with a cast and its way back."""
    return (bits + 0x7FFF + (bits >> 16 & 1)) & -0x10000


@struct.dataclass
class FixedTokens:
    """Tokens in fixed point beside `PackedRows`, as its kernel reads them.

    Attributes:
      words: X_l of four numbers, the first in the lowest byte; those of a token together, in it
        those of an l.
      sums: 12 sum_j of the upper and of the lower half of X_j, a row of each for each token.
      exponents: E.
    """

    words: UInt32[Array, "words_of_tokens blocks"]
    sums: Int32[Array, "halves_of_tokens blocks"]
    exponents: Int32[Array, "tokens blocks"]


def to_fixed(
    x: Prologue,
    rows: PackedRows,
    layer: Int32[Array, ""],
    bits: int = 24,
    *,
    interpret: bool = False,
) -> FixedTokens:
    """Each f(x)_b M_b, or f(x)_b, in fixed point; the residual is left alone."""
    from jax.experimental.pallas import triton as plt

    m, blocks = len(x.parts[0]), rows.scale_bytes.shape[-1]
    given, ready = move.in_a_kernel(x, blocks)
    moves = () if rows.matrices is None else (rows.matrices,)
    sizes = (8 * BYTES * m, 2 * m, m)
    types = (jnp.uint32, jnp.int32, jnp.int32)
    found = pl.pallas_call(
        functools.partial(_kernel, ready, len(moves), bits),
        grid=(blocks // BLOCKS,),
        in_specs=[pl.BlockSpec()] * (1 + len(moves) + len(given)),
        out_specs=[pl.BlockSpec((rows, BLOCKS), lambda i: (0, i)) for rows in sizes],
        out_shape=[
            jax.ShapeDtypeStruct((rows, blocks), dtype)
            for rows, dtype in zip(sizes, types, strict=True)
        ],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(layer.reshape(1), *moves, *given)
    return FixedTokens(*found)


def _kernel(ready: Any, moves: int, bits: int, layer: Any, *refs: Any) -> None:
    *given, words, sums, exponents = refs
    at = pl.ds(pl.program_id(0) * BLOCKS, BLOCKS)
    own = [matrices[layer[0], at, :, :] for matrices in given[:moves]]
    places = 8 * lax.broadcasted_iota(jnp.int32, (BLOCKS, 8, 4), 2)
    for token in range(len(exponents)):
        y = ready(layer[0], token, at, given[moves:])
        for matrices in own:
            y = jnp.sum(y[:, :, None] * matrices, axis=1)
        whole, exponents[token, :] = fixed(y, bits)
        for number in range(BYTES):
            byte = (whole >> (8 * number)) & 0xFF
            word = jnp.sum(byte.reshape(BLOCKS, 8, 4) << places, axis=2)
            words[pl.ds(8 * (BYTES * token + number), 8), :] = word.T.astype(jnp.uint32)
        for row, half in enumerate((whole >> 16, whole & 0xFFFF)):
            sums[2 * token + row, :] = LARGEST * jnp.sum(half, axis=1)
