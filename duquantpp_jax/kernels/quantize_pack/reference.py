"""What `formats` gives: two passes over x on a GPU, as XLA does not fuse a maximum with its use."""

import functools

import jax
from jaxtyping import Array, Float, UInt8

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.formats import MXFP4
from duquantpp_jax.formats.packing import pack_blocks


def quantize_pack(
    x: Float[Array, "*batch k"], rule: ScaleRule
) -> tuple[UInt8[Array, "*batch bytes"], UInt8[Array, "*batch blocks"]]:
    """Packed codes and scale bytes."""
    packed, scale_bytes = _in_blocks(x, rule)
    return _in_a_row(packed), scale_bytes


@functools.partial(jax.jit, static_argnames="rule")
def _in_blocks(
    x: Float[Array, "*batch k"], rule: ScaleRule
) -> tuple[UInt8[Array, "*blocks bytes"], UInt8[Array, "*blocks"]]:
    q = MXFP4(scale_rule=rule).encode(x)
    return pack_blocks(q), q.scale_bytes()


@functools.partial(jax.jit, donate_argnums=0)
def _in_a_row(packed: UInt8[Array, "*blocks block_bytes"]) -> UInt8[Array, "*batch bytes"]:
    """The same memory (donated); a program of its own for the reason in `pack_blocks`."""
    *batch, count, size = packed.shape
    return packed.reshape(*batch, count * size)
