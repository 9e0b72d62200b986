"""A block's sum in integers: a byte permutation decodes four codes, a dot product of bytes adds.

Twice an E2M1 value is one of 0, 1, 2, 3, 4, 6, 8, 12. PRMT picks four of eight bytes by the lower
three bits of four nibbles, and gives zero for a nibble whose highest bit is set, as these bytes
have none: so it decodes four codes at a time, of which the negative ones are zero. With all sign
bits flipped the positive ones are. A block's sum is that of the first less that of the second, at
most 32 * 12 * 12 in magnitude, and exact.

Each thread has blocks of its own and adds them in float32; it reads the next ones before it
multiplies, so that memory is not idle meanwhile. A program has rows of a single linear, whose
output is an array of its own: a kernel that comes after would have to be given a copy of a slice. A
kernel reads its layer where it stands among all layers, since XLA may copy a slice.
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
from duquantpp_jax.kernels.matvec.rows import WORDS, PackedRows
from duquantpp_jax.kernels.matvec.tokens import Tokens

ROWS = 8
"""Most rows of a program."""
BLOCKS, BLOCKS_OF_A_THREAD = 64, 4
"""Most blocks of a row that a program has at a time, of which each thread reads neighbours."""

AHEAD = True
"""Whether the next blocks are read before those that are there are multiplied."""

_DOT = """{
  .reg .b32 elements;
  prmt.b32 elements, $4, 0x0C080604, $1;
  dp4a.s32.s32 $0, elements, $2, $3;
}"""
_SMALL = 0x03020100
"""Twice the values of the first four codes; those of the others are in the line above."""


def matvec(
    x: Tokens,
    rows: PackedRows,
    layer: Int32[Array, ""],
    residual: Float32[Array, "tokens _n"] | None = None,
    *,
    interpret: bool = False,
) -> tuple[Float32[Array, "tokens _n"], ...]:
    """x W^T of each linear, or of a single one x W^T + residual."""
    from jax.experimental.pallas import triton as plt

    m, (_, _, blocks) = len(x.scale_bytes), rows.scale_bytes.shape
    count = math.gcd(ROWS, *rows.sizes)
    shape = count, math.gcd(blocks, BLOCKS)
    firsts = tuple(itertools.accumulate((n // count for n in rows.sizes), initial=0))
    given = [layer.reshape(1), x.words, x.scale_bytes, rows.words, rows.scale_bytes]
    given += [] if residual is None else [residual]
    dot = _interpreted if interpret else _dot
    barrier = plt.debug_barrier if AHEAD and not interpret else lambda: None
    run = pl.pallas_call(
        functools.partial(_kernel, shape, firsts, dot, barrier, residual is not None),
        grid=(firsts[-1],),
        in_specs=[pl.BlockSpec()] * len(given),
        out_specs=[pl.BlockSpec()] * len(rows.sizes),
        out_shape=[jax.ShapeDtypeStruct((m, n), jnp.float32) for n in rows.sizes],
        compiler_params=plt.CompilerParams(num_warps=_warps(shape), num_stages=1),
        interpret=interpret,
    )
    return tuple(run(*given))


def _warps(shape: tuple[int, int]) -> int:
    """Warps of 32 threads for so many rows and blocks at a time."""
    return max(1, math.prod(shape) // BLOCKS_OF_A_THREAD // 32)


def _kernel(
    shape: tuple[int, int], firsts: tuple[int, ...], dot: Any, barrier: Any, adds: bool, layer: Any,
    x: Any, x_bytes: Any, words: Any, scale_bytes: Any, *others: Any,
) -> None:  # fmt: skip
    (count, part), own, program = shape, layer[0], pl.program_id(0)
    rows = pl.ds(program * count, count)
    tokens, blocks = x_bytes.shape
    steps = blocks // part
    # A constant that the compiler cannot see: one that it sees it moves to a register at each use.
    small = jnp.broadcast_to(jnp.uint32(_SMALL) | (own >> 31).astype(jnp.uint32), shape)

    def read(i: Any) -> tuple[list[Array], Array]:
        at = pl.ds(i * part, part)
        codes = [words[own, word, rows, at] for word in range(WORDS)]
        return codes, scale_bytes[own, rows, at].astype(jnp.int32)

    def multiplied(
        i: Any, weights: tuple[list[Array], Array], sums: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        each = (products(token, *weights, pl.ds(i * part, part)) for token in range(tokens))
        return tuple(map(jnp.add, each, sums))

    def step(i: Any, before: tuple[Any, Any]) -> tuple[Any, Any]:
        after = read(i + 1)
        barrier()  # the compiler moves no read across it: it would read when it has multiplied
        return after, multiplied(i, *before)

    def products(token: int, codes: list[Array], byte: Array, at: Any) -> Array:
        plus = minus = jnp.zeros(shape, jnp.int32)
        for word, code in enumerate(codes):
            flipped = code ^ jnp.uint32(0x88888888)
            for half in range(2):
                row = pl.ds(8 * token + 2 * word + half, 1)
                elements = jnp.broadcast_to(x[row, at], shape)
                plus = dot(code >> 16 if half else code, elements, plus, small)
                minus = dot(flipped >> 16 if half else flipped, elements, minus, small)
        other = jnp.broadcast_to(x_bytes[pl.ds(token, 1), at].astype(jnp.int32), shape)
        power = jnp.maximum(byte + other - 256, -252)  # below that any sum becomes zero
        scaled = (plus - minus).astype(jnp.float32) * power_of_two(power >> 1)
        scaled = scaled * power_of_two(power - (power >> 1))
        return jnp.where((byte == 255) | (other == 255), jnp.float32(jnp.nan), scaled)

    start = read(0), (jnp.zeros(shape, jnp.float32),) * tokens
    weights, sums = lax.fori_loop(0, steps - 1, step, start)
    found = [jnp.sum(each, axis=1) for each in multiplied(steps - 1, weights, sums)]
    for y, (first, end) in zip(others[adds:], itertools.pairwise(firsts), strict=True):

        @pl.when((first <= program) & (program < end))
        def _(y: Any = y, first: int = first) -> None:
            at = pl.ds((program - first) * count, count)
            for token, each in enumerate(found):
                y[token, at] = each + others[0][token, at] if adds else each


def _dot(codes: Array, elements: Array, added: Array, small: Array) -> Array:
    """The elements times four codes, the lowest, of which negative ones count as zero."""
    from jax.experimental.pallas import triton as plt

    out = [jax.ShapeDtypeStruct(added.shape, jnp.int32)]
    arguments: Any = {"args": [codes, elements, added, small], "result_shape_dtypes": out}
    return plt.elementwise_inline_asm(_DOT, constraints="=r,r,r,r,r", pack=1, **arguments)[0]


def _interpreted(codes: Array, elements: Array, added: Array, small: Array) -> Array:
    """`_dot` without a GPU's instructions."""
    del small
    code = lowest_four(codes)
    value = jnp.where(code < 4, code, jnp.where(code < 6, 2 * code - 4, 4 * code - 16))
    element = lax.bitcast_convert_type(elements, jnp.int8).astype(jnp.int32)
    return added + jnp.sum(jnp.where(code < 8, value, 0) * element, axis=-1)


def lowest_four(codes: Array) -> Array:
    """The four lowest codes of each word, in a dimension of their own; not in a GPU's kernel."""
    places = lax.broadcasted_iota(codes.dtype, (*codes.shape, 4), codes.ndim)
    return (codes[..., None] >> (4 * places)).astype(jnp.int32) & 15
