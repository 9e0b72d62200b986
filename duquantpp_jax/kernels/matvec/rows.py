"""Weights in MXFP4 as `matvec` reads them.

A block is four words of eight codes, the first code in the lowest bits. The words of one place in
their blocks stand together, so that neighbouring threads, each with blocks of its own, read
neighbouring words.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float32, UInt8, UInt32

from duquantpp_jax.core import MXArray
from duquantpp_jax.formats import E2M1
from duquantpp_jax.formats.packing import pack_nibbles

BLOCK = 32
WORDS = 4
"""Words of a block."""
ROWS_TOGETHER, BLOCKS_TOGETHER = 32, 32
"""Rows and blocks are filled up to multiples of these with zeros, which add nothing."""


def is_mxfp4(q: Any) -> TypeGuard[MXArray]:
    """Whether an array is in MXFP4 as the standard has it."""
    return (
        isinstance(q, MXArray)
        and (q.element, q.block_size) == (E2M1, BLOCK)
        and q.scales.dtype == jnp.float8_e8m0fnu
    )


@struct.dataclass
class PackedRows:
    """The weights of linears that share an input, one below the other.

    Attributes:
      width: Inputs of a linear.
      sizes: Rows of each linear.
      matrices: What moves each block of the input, where that is all that moves it.
    """

    # "or Any": scan and others put objects here that are not arrays.
    words: UInt32[Array, "*layers 4 rows blocks"] | Any
    scale_bytes: UInt8[Array, "*layers rows blocks"] | Any
    width: int = struct.field(pytree_node=False)
    sizes: tuple[int, ...] = struct.field(pytree_node=False)
    matrices: Float32[Array, "*layers blocks 32 32"] | Any = None

    @classmethod
    def of(cls, weights: Sequence[MXArray], matrices: Array | None = None) -> PackedRows:
        """Lays out weights [rows, k] in MXFP4, or stacks of them."""
        sizes = tuple(w.shape[-2] for w in weights)
        words, scale_bytes = zip(*map(_laid_out, weights), strict=True)
        missing = -sum(sizes) % ROWS_TOGETHER

        def joined(parts: Sequence[Array]) -> Array:
            return filled(jnp.concatenate(parts, axis=-2), -2, missing)

        words, scale_bytes = joined(words), joined(scale_bytes)
        if matrices is not None:
            matrices = filled(matrices, -3, scale_bytes.shape[-1] - matrices.shape[-3])
        return cls(words, scale_bytes, weights[0].shape[-1], sizes, matrices)

    def split(self, y: Float[Array, "*tokens rows"]) -> tuple[Float[Array, "*tokens _n"], ...]:
        """The outputs of each linear."""
        ends = itertools.accumulate(self.sizes, initial=0)
        return tuple(y[..., a:b] for a, b in itertools.pairwise(ends))


@jax.jit
def _laid_out(w: MXArray) -> tuple[Array, Array]:
    packed = pack_nibbles(w.codes())
    packed = packed.reshape(*packed.shape[:-1], -1, WORDS, 4)
    words = jnp.moveaxis(jax.lax.bitcast_convert_type(packed, jnp.uint32), -1, -3)
    missing = -words.shape[-1] % BLOCKS_TOGETHER
    return filled(words, -1, missing), filled(w.scale_bytes(), -1, missing)


def filled(x: Array, axis: int, missing: int) -> Array:
    """x with so many zeros appended to an axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths)


def in_blocks(x: Float[Array, "tokens k"], count: int) -> Float[Array, "tokens blocks 32"]:
    """x in so many blocks, zeros in those that it does not reach."""
    return filled(x, -1, count * BLOCK - x.shape[-1]).reshape(*x.shape[:-1], count, BLOCK)
