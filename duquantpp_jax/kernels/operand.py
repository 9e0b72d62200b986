"""A quantized matrix in the layout that tensor cores read.

    value[r, c] = elements[r, c] * scale[r, c // block] (* tensor_scale)

Elements have K as last axis, scales are in 128x4 tiles (formats/packing.py). TMA copies whole
tiles, so rows are padded to a multiple of 8, and K to a row of shared memory (128 bytes). Padding
is zero in elements and scale bytes and adds nothing to a product.

float4 arrays have two elements a byte on a device, the lower index in the low nibble, as the
hardware packs them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Shaped

from duquantpp_jax.core import Element, MXArray
from duquantpp_jax.formats.packing import swizzle_scales, unswizzle_scales

DEPTH_BYTES = 128  # of K in one row of shared memory: the widest TMA swizzle


@struct.dataclass
class Operand:
    """One side of a block-scaled matmul.

    Attributes:
      elements: float4_e2m1fn, float8_e4m3fn or float8_e5m2, padded as above.
      scales: float8_e8m0fnu (or float8_e4m3fn, for NVFP4) in 128x4 tiles.
      tensor_scale: The second level of scales, for formats with two levels.
      shape: Rows and columns before padding.
    """

    # "or Any": eval_shape, vmap and others put objects here that are not arrays.
    elements: Shaped[Array, "padded_rows padded_k"] | Any
    scales: Shaped[Array, "row_tiles column_tiles 32 16"] | Any
    tensor_scale: Float[Array, ""] | Any = None
    shape: tuple[int, int] = struct.field(pytree_node=False, kw_only=True)
    element: Element = struct.field(pytree_node=False, kw_only=True)
    block_size: int = struct.field(pytree_node=False, kw_only=True)

    @classmethod
    def from_mx(cls, mx: MXArray) -> Operand:
        """Lays a quantized matrix out for tensor cores.

        Raises:
          ValueError: Not a matrix, elements without a native type, or scales of more than a byte.
        """
        if len(mx.shape) != 2:
            raise ValueError(f"an operand has rows and K, not the shape {mx.shape}")
        if mx.elements.dtype == jnp.uint8 or mx.scales.dtype.itemsize != 1:
            raise ValueError(
                f"tensor cores read float4 or float8 elements with one-byte scales, not "
                f"{mx.element.name} with {mx.scales.dtype}"
            )
        (rows, k), block = mx.shape, mx.block_size
        extra = -k % depth_of(mx.elements.dtype)
        padding = [(0, padded_rows(rows) - rows, 0), (0, extra, 0)]
        zero = mx.element.store(jnp.zeros((), jnp.uint8))
        scale_bytes = jnp.pad(mx.scale_bytes(), ((0, 0), (0, extra // block)))
        elements = jax.lax.pad(mx.elements, zero, padding)
        scales = jax.lax.bitcast_convert_type(swizzle_scales(scale_bytes), mx.scales.dtype)
        return cls(
            elements, scales, mx.tensor_scale, shape=(rows, k), element=mx.element, block_size=block
        )

    def to_mx(self) -> MXArray:
        """The quantized matrix without padding, scales in rows."""
        (rows, k), block = self.shape, self.block_size
        tiles = jax.lax.bitcast_convert_type(self.scales, jnp.uint8)
        scale_bytes = unswizzle_scales(tiles, rows, self.elements.shape[1] // block)
        scales = jax.lax.bitcast_convert_type(scale_bytes[:, : k // block], self.scales.dtype)
        elements = self.elements[:rows, :k]
        return MXArray(elements, scales, self.tensor_scale, element=self.element, block_size=block)

    def dequantize(self) -> Float[Array, "rows k"]:
        """The matrix in float32."""
        return self.to_mx().dequantize()


def padded_rows(rows: int) -> int:
    """Rows that TMA's tiles of eight can copy: a multiple of 8, or fewer than 8."""
    return rows if rows < 8 else -(-rows // 8) * 8


def depth_of(dtype: Any) -> int:
    """Elements of K in one row of shared memory: 256 of four bits, 128 of eight."""
    return DEPTH_BYTES * 8 // jnp.finfo(dtype).bits
