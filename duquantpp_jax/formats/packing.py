"""Layouts of storage: two codes a byte, and the 128x4 tiles in which tensor cores read scales.

    nibbles   byte_i = code_{2i} + 16 code_{2i+1}                        the lower index is low
    tiles     tile[r // 128, c // 4][r % 32, 4 ((r % 128) // 32) + c % 4] = scale[r, c]

Both lose nothing. Where a shape does not fill its last byte or tile, the rest is zeros, and the
true width or shape is what the way back is given.

Source: nibbles as in the MXFP4 checkpoints of gpt-oss and compressed-tensors; tiles as in the
cuBLAS documentation, "1D block scaling factors layout", and PTX ISA, tcgen05.mma scale factors.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from duquantpp_jax.core import MXArray

TILE_ROWS, TILE_COLUMNS = 128, 4


def pack_nibbles(
    codes: UInt8[Array, "*shape"], *, pad: bool = False
) -> UInt8[Array, "*batch bytes"]:
    """Two four-bit codes a byte along the last axis, the lower index in the low nibble.

    Args:
      codes: Codes below 16, of at least one axis.
      pad: Fill the last byte of an odd width with a zero code.

    Raises:
      ValueError: There is no axis, or the width is odd and `pad` was not asked for.
    """
    if codes.ndim == 0:
        raise ValueError("cannot pack a single code: give an array with at least one axis")
    width = codes.shape[-1]
    if width % 2:
        if not pad:
            raise ValueError(
                f"a width of {width} leaves half a byte: ask for pad=True and keep the width"
            )
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(
    packed: UInt8[Array, "*shape"], width: int | None = None
) -> UInt8[Array, "*batch k"]:
    """The codes that `pack_nibbles` packed.

    Args:
      packed: Two codes a byte, of at least one axis.
      width: Codes along the last axis; two a byte if not given.

    Raises:
      ValueError: There is no axis, or so many bytes do not hold that width.
    """
    if packed.ndim == 0:
        raise ValueError("cannot unpack a single byte: give an array with at least one axis")
    size = packed.shape[-1]
    width = 2 * size if width is None else width
    if size != -(-width // 2):
        raise ValueError(f"{size} bytes hold {2 * size - 1} or {2 * size} codes, not {width}")
    codes = jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * size)
    return codes[..., :width]


def pack_blocks(q: MXArray) -> UInt8[Array, "*blocks bytes"]:
    """The elements of an array of four-bit elements, two a byte, block by block.

    `pack_blocks(format.encode(x))` in one jit goes from numbers to bytes in one pass.

    Raises:
      ValueError: The elements have another size, or a block is half a byte too long.
    """
    if q.element.bits != 4:
        raise ValueError(f"elements of {q.element.bits} bits are not packed in nibbles")
    if q.block_size % 2:
        raise ValueError(f"a block of {q.block_size} leaves half a byte: use pack_nibbles")
    # XLA's CPU code is slow where one loop also puts the blocks in a row: two loops, by a barrier.
    # jax 0.10 drops it; there, flatten outside of jit what jit gave.
    packed = pack_nibbles(q.codes().reshape(*q.scales.shape, q.block_size))
    return jax.lax.optimization_barrier(packed)


def pack_elements(q: MXArray) -> UInt8[Array, "*batch bytes"]:
    """`pack_blocks` with the blocks in a row, as they lie in memory.

    Raises:
      ValueError: As there.
    """
    packed = pack_blocks(q)
    *batch, count, size = packed.shape
    return packed.reshape(*batch, count * size)


def swizzle_scales(
    scale_bytes: UInt8[Array, "*shape"],
) -> UInt8[Array, "*batch row_tiles column_tiles 32 16"]:
    """Scale bytes in 128x4 tiles of 512 bytes; tiles that are not full are filled with zeros.

    Args:
      scale_bytes: Of shape [..., rows, columns].

    Raises:
      ValueError: Fewer than two axes.
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
    """The scale bytes that `swizzle_scales` laid out.

    Args:
      tiles: 128x4 tiles.
      rows: Rows of scales before padding.
      columns: Columns of scales before padding.

    Raises:
      ValueError: So many tiles do not hold that shape.
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
