"""A block's sum in integers: byte permutations decode four codes, dot products of bytes add.

w_j 2 + 12 is a byte of 0 to 24. PRMT picks four of eight bytes by the lower three bits of four
nibbles, and gives zero for a nibble whose highest bit is set, as these bytes have none: so two of
them give twice the positive weights and twice the negative ones, and an addition makes bytes of
both. With X_l the bytes of x in fixed point (fixed_point.py) and the rest exact in 32 bits,

    sum_j X_j 2 w_j  =  sum_l 2^(8 l) sum_j X_lj (2 w_j + 12)  -  12 sum_j X_j

taken for the upper two bytes and for the lower two by themselves, which are added in float32.
Each thread has blocks of its own, in some rows, for which it reads the tokens once.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32, Int32

from duquantpp_jax.formats.division import power_of_two
from duquantpp_jax.kernels.float_matvec.fixed_point import (
    BYTES,
    LARGEST,
    NOT_FINITE,
    FixedTokens,
)
from duquantpp_jax.kernels.matvec.rows import WORDS, PackedRows
from duquantpp_jax.kernels.matvec.triton import BLOCKS, lowest_four

ROWS, WARPS = 8, 4
"""Rows that the warps of a program have at a time, and its warps."""
TIMES = 4, 2, 1, 1
"""Times as many rows of a program by the number of tokens, whose sums need registers."""

_DECODE = """{
  .reg .b32 flipped, minus;
  xor.b32 flipped, $1, 0x88888888;
  prmt.b32 $0, 0x03020100, 0x0C080604, $1;
  prmt.b32 minus, 0x03020100, 0x0C080604, flipped;
  sub.u32 $0, $0, minus;
  add.u32 $0, $0, 0x0C0C0C0C;
}"""
_DOT = "dp4a.u32.{} $0, $1, $2, $3;"


def matvec(
    x: FixedTokens,
    rows: PackedRows,
    layer: Int32[Array, ""],
    residual: Float32[Array, "tokens rows"] | None = None,
    *,
    interpret: bool = False,
) -> Float32[Array, "tokens rows"]:
    """x W^T + residual, of rows that are filled up, too."""
    from jax.experimental.pallas import triton as plt

    m, (_, n, blocks) = len(x.exponents), rows.scale_bytes.shape
    shape = TIMES[m - 1], ROWS, math.gcd(blocks, BLOCKS)
    instructions = (_interpreted_bytes, _interpreted_dot) if interpret else (_bytes, _dot)
    count = shape[0] * ROWS
    added = () if residual is None else (residual,)
    return pl.pallas_call(
        functools.partial(_kernel, shape, instructions),
        grid=(n // count,),
        in_specs=[pl.BlockSpec()] * 6 + [pl.BlockSpec((m, count), lambda i: (0, i))] * len(added),
        out_specs=pl.BlockSpec((m, count), lambda i: (0, i)),
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
    )(layer.reshape(1), x.words, x.sums, x.exponents, rows.words, rows.scale_bytes, *added)


def _kernel(
    sizes: tuple[int, int, int], instructions: tuple[Any, Any], layer: Any, x: Any, sums: Any,
    exponents: Any, words: Any, scale_bytes: Any, *others: Any,
) -> None:  # fmt: skip
    (times, *shape), (decoded, dot), own = sizes, instructions, layer[0]
    *residuals, y = others
    first = pl.program_id(0) * times
    rows = [pl.ds((first + i) * ROWS, ROWS) for i in range(times)]
    tokens, blocks = exponents.shape
    every = [(token, i) for token in range(tokens) for i in range(times)]

    def spread(array: Array) -> Array:
        return jnp.broadcast_to(array, shape)

    def step(i: Any, before: tuple[Array, ...]) -> tuple[Array, ...]:
        at = pl.ds(i * shape[1], shape[1])
        codes = [[words[own, word, part, at] for word in range(WORDS)] for part in rows]
        power = [scale_bytes[own, part, at].astype(jnp.int32) for part in rows]
        added = {part: [jnp.zeros(shape, jnp.int32)] * BYTES for part in every}
        for group in range(2 * WORDS):
            four = [decoded(each[group // 2] >> (16 * (group % 2))) for each in codes]
            for token, number in itertools.product(range(tokens), range(BYTES)):
                row = pl.ds(8 * (BYTES * token + number) + group, 1)
                numbers = spread(x[row, at])
                for place, weights in enumerate(four):
                    so_far = added[token, place]
                    so_far[number] = dot(number == BYTES - 1, weights, numbers, so_far[number])
        found = []
        for token in range(tokens):
            halves = [spread(sums[pl.ds(2 * token + half, 1), at]) for half in range(2)]
            exponent = spread(exponents[pl.ds(token, 1), at])
            found += [_whole(added[token, i], halves, exponent, power[i]) for i in range(times)]
        return tuple(map(jnp.add, before, found))

    totals = (jnp.zeros(shape, jnp.float32),) * len(every)
    totals = lax.fori_loop(0, blocks // shape[1], step, totals)
    for (token, i), total in zip(every, totals, strict=True):
        at = pl.ds(i * ROWS, ROWS)
        y[token, at] = sum((residual[token, at] for residual in residuals), jnp.sum(total, axis=1))


def _whole(added: list[Array], halves: list[Array], exponent: Array, byte: Array) -> Array:
    """The sum of a block, of its bytes' sums."""
    high = (added[3] << 8) + added[2] - halves[0]
    low = (added[1] << 8) + added[0] - halves[1]
    # Below that any sum becomes zero; above, Inf.
    power = jnp.clip(exponent + byte - 159, -252, 254)
    total = high.astype(jnp.float32) * 65536 + low.astype(jnp.float32)
    total = total * power_of_two(power >> 1) * power_of_two(power - (power >> 1))
    return jnp.where((byte == 255) | (exponent == NOT_FINITE), jnp.float32(jnp.nan), total)


def _inline(assembly: str, *arguments: Array) -> Array:
    from jax.experimental.pallas import triton as plt

    out = [jax.ShapeDtypeStruct(arguments[0].shape, jnp.int32)]
    constraints = ",".join(["=r"] + ["r"] * len(arguments))
    more: Any = {"args": arguments, "result_shape_dtypes": out}
    return plt.elementwise_inline_asm(assembly, constraints=constraints, pack=1, **more)[0]


def _bytes(codes: Array) -> Array:
    """2 w + 12 of the four lowest codes."""
    return _inline(_DECODE, codes)


def _dot(signed: bool, weights: Array, numbers: Array, added: Array) -> Array:
    """Four bytes of weights times four of numbers."""
    return _inline(_DOT.format("s32" if signed else "u32"), weights, numbers, added)


def _interpreted_bytes(codes: Array) -> Array:
    """`_bytes` without a GPU's instructions."""
    code = lowest_four(codes)
    size = code & 7
    twice = jnp.where(size < 4, size, jnp.where(size < 6, 2 * size - 4, 4 * size - 16))
    bytes = jnp.where(code < 8, LARGEST + twice, LARGEST - twice).astype(jnp.uint8)
    return lax.bitcast_convert_type(bytes, jnp.int32)


def _interpreted_dot(signed: bool, weights: Array, numbers: Array, added: Array) -> Array:
    """`_dot` without a GPU's instructions."""
    types = jnp.uint8, jnp.int8 if signed else jnp.uint8
    pairs = zip((weights, numbers), types, strict=True)
    bytes = (lax.bitcast_convert_type(word, kind).astype(jnp.int32) for word, kind in pairs)
    return added + jnp.sum(math.prod(bytes), axis=-1)
