"""One pass over x: blocks moved by their matrices on tensor cores, and rounded from registers.

    y_b = x_b M_b            M_b = diag(1 / smooth_b) R_b

The products are in float32, of parts (parts.py).

A program keeps the matrices of some blocks, and goes through tiles of rows, of which the next are
on their way while one is moved. The last tiles begin where they end with the last row, so that rows
that two of them have are written twice, alike.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float, Float32, UInt8, UInt32

from duquantpp_jax.core import MXArray, ScaleRule
from duquantpp_jax.formats import E2M1
from duquantpp_jax.formats.division import power_of_two
from duquantpp_jax.kernels.block_scale import (
    RAISED_ABOVE,
    code,
    halves,
    magnitude,
    nearest,
    scale_of,
    with_sign,
)
from duquantpp_jax.kernels.operand import Operand
from duquantpp_jax.kernels.parts import PARTS, parts_of

ROWS, LONE_ROWS, LEAST_ROWS, BLOCKS = 64, 128, 16, 2
"""Rows of a tile, those of a lone block, the fewest that tensor cores take, and the blocks that a
program moves: the codes of two are a sector of memory, which is written whole."""
PROGRAMS, WARPS = 1056, 4
"""Programs that fill a GPU, and the warps of one."""
TILES = {"bfloat16": (16, 3), "float32": (8, 2)}
"""Most tiles of a program, and how many are on their way, by the type of x."""
BLOCK, WORDS = 32, 4
"""Numbers of a block, and words of its codes."""


def numbers(
    x: Float[Array, "m k"],
    matrices: Float32[Array, "_ 32 32"],
    rule: ScaleRule,
    *,
    interpret: bool = False,
) -> BFloat16[Array, "m k"]:
    """Q(x_b M_b), which bfloat16 holds exactly."""
    (y,) = _call(x, matrices, rule, [(BLOCK, jnp.bfloat16)], interpret)
    return y


def packed(
    x: Float[Array, "m k"],
    matrices: Float32[Array, "_ 32 32"],
    rule: ScaleRule,
    *,
    interpret: bool = False,
) -> tuple[UInt8[Array, "m bytes"], UInt8[Array, "m blocks"]]:
    """Codes of Q(x_b M_b), two a byte, and scale bytes."""
    m, k = x.shape
    given = x.reshape(-1, BLOCK) if len(matrices) == 1 else x  # of one matrix all blocks are alike
    outs = [(WORDS, jnp.uint32), (1, jnp.uint8)]
    words, scale_bytes = _call(given, _by_word(matrices), rule, outs, interpret)
    codes = lax.bitcast_convert_type(words, jnp.uint8).reshape(m, k // 2)
    return codes, scale_bytes.reshape(m, k // BLOCK)


def rotate_quantize(
    x: Float[Array, "m k"],
    rotation: Float[Array, "blocks 32 32"],
    smooth: Float[Array, " _k"] | None,
    *,
    scale_rule: ScaleRule,
    interpret: bool = False,
) -> Operand:
    """MXFP4 of (x / smooth)_b R_b."""
    codes, scale_bytes = packed(x, joined(rotation, smooth), scale_rule, interpret=interpret)
    elements = lax.bitcast_convert_type(codes, jnp.float4_e2m1fn).reshape(x.shape)
    scales = lax.bitcast_convert_type(scale_bytes, jnp.float8_e8m0fnu)
    return Operand.from_mx(MXArray(elements, scales, element=E2M1, block_size=BLOCK))


def joined(
    rotation: Float[Array, "blocks 32 32"], smooth: Float[Array, " _k"] | None
) -> Float32[Array, "_ 32 32"]:
    """diag(1 / smooth_b) R_b."""
    matrices = rotation.astype(jnp.float32)
    return matrices if smooth is None else matrices / smooth.reshape(-1, BLOCK, 1)


def why_not(x: Array, rule: ScaleRule) -> str | None:
    """Why x cannot be moved and rounded so; None if it can."""
    if rule not in RAISED_ABOVE:
        return f"it has no rule {rule.value}"
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 or bfloat16, and x is {x.dtype}"
    return None


def _by_word(matrices: Float32[Array, "_ 32 32"]) -> Float32[Array, "_ 32 32"]:
    """Columns 8 q + 4 h + g moved to 8 g + 2 q + h.

    Tensor cores give each of four threads two neighbouring columns of every eight: so moved, these
    are the eight codes of a word.
    """
    columns = matrices.reshape(-1, BLOCK, WORDS, 2, 4)
    return jnp.moveaxis(columns, 4, 2).reshape(matrices.shape)


def _call(x: Array, matrices: Array, rule: ScaleRule, outs: Any, interpret: bool) -> Any:
    from jax.experimental.pallas import triton as plt

    m, k = x.shape
    blocks, missing = k // BLOCK, max(0, LEAST_ROWS - m)
    x = jnp.pad(x, ((0, missing), (0, 0)))
    each = math.gcd(blocks, BLOCKS)
    rows = min(LONE_ROWS if blocks == 1 else ROWS, 1 << (len(x).bit_length() - 1))
    tiles = -(-len(x) // rows)
    most, stages = TILES[x.dtype.name]
    repeats = max(1, min(most, tiles * (blocks // each) // PROGRAMS))
    shape = rows, repeats, each
    kernel = functools.partial(_kernel, RAISED_ABOVE[rule], shape, len(matrices) == 1)
    found = pl.pallas_call(
        kernel,
        grid=(blocks // each, -(-tiles // repeats)),
        in_specs=[pl.BlockSpec()] * 2,
        out_specs=[pl.BlockSpec()] * len(outs),
        out_shape=[jax.ShapeDtypeStruct((len(x), blocks * n), dtype) for n, dtype in outs],
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=stages),
        interpret=interpret,
    )(x, jnp.stack(parts_of(matrices)))
    return [y[:m] for y in found]


def _kernel(
    raised_above: int, shape: tuple[int, int, int], shared: bool, x: Any, matrices: Any, out: Any,
    *more: Any,
) -> None:  # fmt: skip
    (rows, repeats, each), m = shape, x.shape[0]
    first = pl.program_id(1) * repeats
    blocks = [pl.program_id(0) * each + i for i in range(each)]
    parts = [
        [matrices[part, 0 if shared else block, :, :] for part in range(PARTS)] for block in blocks
    ]

    def step(tile: Any, nothing: Any) -> Any:
        own = pl.ds(jnp.minimum((first + tile) * rows, m - rows), rows)
        words, bytes = [], []
        for block, matrix in zip(blocks, parts, strict=True):
            y = _moved(x[own, pl.ds(block * BLOCK, BLOCK)], matrix)
            exponent, bad = scale_of(jnp.max(magnitude(y), axis=1), raised_above)
            if not more:
                out[own, pl.ds(block * BLOCK, BLOCK)] = _numbers(y, exponent, bad)
                continue
            words.append(_words(y, exponent, bad))
            bytes.append(jnp.where(bad, 255, exponent + 127).astype(jnp.uint8))
        for scales in more:
            joined = jnp.swapaxes(_beside(words).reshape(rows, WORDS, each), 1, 2)
            out[own, pl.ds(blocks[0] * WORDS, WORDS * each)] = joined.reshape(rows, -1)
            scales[own, pl.ds(blocks[0], each)] = _beside(bytes).reshape(rows, each)
        return nothing

    lax.fori_loop(0, repeats, step, jnp.int32(0))


def _numbers(y: Array, exponent: Array, bad: Array) -> BFloat16[Array, "rows 32"]:
    power = power_of_two(-exponent)[:, None]
    # Of 2^-127 the bits are those of half of 2^-126.
    bits = jnp.where(exponent == -127, 0x00400000, (exponent + 127) << 23)
    scale = lax.bitcast_convert_type(jnp.where(bad, 0x7FC00000, bits), jnp.float32)
    value = with_sign(nearest(jnp.abs(y) * power) * scale[:, None], y)
    return value.astype(jnp.bfloat16)


def _words(y: Array, exponent: Array, bad: Array) -> UInt32[Array, "rows 4"]:
    """Eight codes in each, of columns as `_by_word` leaves them."""
    codes = code(y * power_of_two(-exponent)[:, None]).reshape(len(y), 4, WORDS, 2)
    place = lax.broadcasted_iota(jnp.uint32, codes.shape, 3)
    low, high = (jnp.sum(jnp.where(place == half, codes, 0), axis=3) for half in (0, 1))
    two = halves(low, high)
    word = jnp.sum(two << (4 * lax.broadcasted_iota(jnp.uint32, two.shape, 1)), axis=1)
    return jnp.where(bad[:, None], word & jnp.uint32(0x88888888), word)


def _beside(parts: list[Array]) -> Array:
    """Arrays, a power of two of them, beside one another on new last axes of two."""
    if len(parts) == 1:
        return parts[0]
    return jnp.stack([_beside(parts[::2]), _beside(parts[1::2])], axis=-1)


def _moved(x: Array, matrix: list[Array]) -> Float32[Array, "rows 32"]:
    """x M as a sum of products of parts, the smallest first."""
    parts, y = parts_of(x), jnp.zeros((x.shape[0], BLOCK), jnp.float32)
    for both in reversed(range(PARTS)):
        for i, part in enumerate(parts[: both + 1]):
            y += jnp.dot(part, matrix[both - i], preferred_element_type=jnp.float32)
    return y
