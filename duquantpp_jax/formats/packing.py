"""Layouts of bytes: two codes a byte, and the 128x4 tiles in which tensor cores read scales.

    nibbles   byte_i = code_{2i} + 16 code_{2i+1}                        the lower index is low
    tiles     tile[r // 128, c // 4][r % 32, 4 ((r % 128) // 32) + c % 4] = scale[r, c]

Source: nibbles as in the MXFP4 checkpoints of gpt-oss and compressed-tensors; tiles as in the
cuBLAS documentation, "1D block scaling factors layout", and PTX ISA, tcgen05.mma scale factors.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from duquantpp_jax.core import MXArray

TILE_ROWS, TILE_COLUMNS = 128, 4


def pack_nibbles(codes: UInt8[Array, "*shape"]) -> UInt8[Array, "*batch bytes"]:
    """Two four-bit codes a byte along the last axis, the lower index in the low nibble.

    Raises:
      ValueError: There is no axis, or the width is odd.
    """
    if codes.ndim == 0 or codes.shape[-1] % 2:
        raise ValueError(f"a shape of {codes.shape} leaves half a byte: make its last axis even")
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: UInt8[Array, "*batch bytes"]) -> UInt8[Array, "*batch k"]:
    """The codes that `pack_nibbles` packed."""
    codes = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return codes.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def pack_blocks(q: MXArray) -> UInt8[Array, "*blocks bytes"]:
    """The elements of an array of four-bit elements, two a byte, block by block.

    `pack_blocks(format.encode(x))` in a jit goes from numbers to bytes in a single pass.

    Raises:
      ValueError: The elements do not have four bits, or the block size is odd.
    """
    if q.element.bits != 4:
        raise ValueError(f"elements of {q.element.bits} bits are not packed in nibbles")
    if q.block_size % 2:
        raise ValueError(f"a block of {q.block_size} leaves half a byte: use pack_nibbles")
    # XLA's CPU code is slow where a single loop packs and also puts the blocks in a row. The
    # barrier makes two loops. jax 0.10 drops it: there, flatten the result outside of the jit.
    packed = pack_nibbles(q.codes().reshape(*q.scales.shape, q.block_size))
    return jax.lax.optimization_barrier(packed)


def swizzle_scales(
    scale_bytes: UInt8[Array, "*shape"],
) -> UInt8[Array, "*batch row_tiles column_tiles 32 16"]:
    """Scale bytes in 128x4 tiles of 512 bytes; zeros fill the last tiles.

    Raises:
      ValueError: There are fewer than two axes.
    """
    if scale_bytes.ndim < 2:
        raise ValueError(f"tiles need rows and columns, not {scale_bytes.ndim} axes")
    *batch, rows, columns = scale_bytes.shape
    row_tiles, column_tiles = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    missing = (row_tiles * TILE_ROWS - rows, column_tiles * TILE_COLUMNS - columns)
    padding = [(0, 0)] * len(batch) + [(0, gap) for gap in missing]
    tiles = jnp.pad(scale_bytes, padding).reshape(*batch, row_tiles, 4, 32, column_tiles, 4)
    tiles = jnp.moveaxis(tiles, (-2, -3, -4), (-4, -3, -2))  # row tile, column tile, 32, 4, 4
    return tiles.reshape(*batch, row_tiles, column_tiles, 32, 16)


def unswizzle_scales(
    tiles: UInt8[Array, "*batch row_tiles column_tiles 32 16"], rows: int, columns: int
) -> UInt8[Array, "*batch {rows} {columns}"]:
    """The scale bytes that `swizzle_scales` laid out, of shape [..., rows, columns].

    Raises:
      ValueError: The tiles do not fit this shape.
    """
    *batch, row_tiles, column_tiles, _, _ = tiles.shape
    if (row_tiles, column_tiles) != (-(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)):
        raise ValueError(
            f"{row_tiles} x {column_tiles} tiles of 128 x 4 do not hold {rows} x {columns} scales"
        )
    rows_first = tiles.reshape(*batch, row_tiles, column_tiles, 32, 4, 4)
    rows_first = jnp.moveaxis(rows_first, (-4, -3, -2), (-2, -3, -4))
    scales = rows_first.reshape(*batch, row_tiles * TILE_ROWS, column_tiles * TILE_COLUMNS)
    return scales[..., :rows, :columns]
