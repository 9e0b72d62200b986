"""The reference, made of `formats`; on a GPU it reads x twice, since XLA does not fuse the maximum.

XLA's CPU code is slow if the same loop also puts blocks in a row. So a second program does this, in
donated memory.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Shaped, UInt8

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.formats import E2M1, MXFP4
from duquantpp_jax.formats.packing import pack_blocks

Packed = tuple[UInt8[Array, "*batch bytes"], UInt8[Array, "*batch blocks"]]
"""Codes, two a byte, and scale bytes."""


def quantize_pack(x: Float[Array, "*batch k"], rule: ScaleRule) -> Packed:
    """Packed codes and scale bytes."""
    packed, scale_bytes = _in_blocks(x, rule)
    return _in_a_row(packed, axes=2), scale_bytes


def unpack_dequantize(
    packed: UInt8[Array, "*batch bytes"], scale_bytes: UInt8[Array, "*batch blocks"]
) -> Float32[Array, "*batch k"]:
    """element * 2^(byte - 127) of packed codes."""
    return _in_a_row(_numbers(packed, scale_bytes), axes=3)


@functools.partial(jax.jit, static_argnames="rule")
def _in_blocks(x: Array, rule: ScaleRule) -> tuple[UInt8[Array, "*blocks bytes"], Array]:
    q = MXFP4(scale_rule=rule).encode(x)
    return pack_blocks(q), q.scale_bytes()


@jax.jit
def _numbers(packed: Array, scale_bytes: Array) -> Float32[Array, "*batch blocks half two"]:
    pairs = packed.reshape(*scale_bytes.shape, -1, 1) >> jnp.array([0, 4], jnp.uint8) & 15
    byte = scale_bytes.astype(jnp.int32)[..., None, None]
    return jnp.where(byte == 255, jnp.float32(jnp.nan), E2M1.decode(pairs, byte - 127))


@functools.partial(jax.jit, donate_argnums=0, static_argnames="axes")
def _in_a_row(blocks: Shaped[Array, "*blocks"], axes: int) -> Shaped[Array, "*batch k"]:
    """The array with its last axes merged into one, in the same memory."""
    return jax.lax.collapse(blocks, blocks.ndim - axes)
