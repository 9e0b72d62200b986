"""The reference: the sums of each block in int32, exactly, and their sum in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Int8, Int32

from duquantpp_jax.core.arrays import times_power_of_two
from duquantpp_jax.formats.packing import unpack_nibbles
from duquantpp_jax.kernels.matvec.rows import PackedRows
from duquantpp_jax.kernels.matvec.tokens import Tokens, doubled


def matvec(x: Tokens, rows: PackedRows, layer: Int32[Array, ""]) -> Float32[Array, "tokens rows"]:
    """x W^T, of rows that are filled up, too."""
    w, scale_bytes = decoded(rows, layer), rows.scale_bytes[layer]
    m, blocks = x.scale_bytes.shape
    elements = jax.lax.bitcast_convert_type(x.words, jnp.int8).reshape(m, 8, blocks, 4)
    elements = jnp.swapaxes(elements, 1, 2).reshape(m, blocks, 32)
    sums = jnp.einsum("mbi,nbi->mnb", elements, w, preferred_element_type=jnp.int32)
    byte = scale_bytes.astype(jnp.int32) + x.scale_bytes.astype(jnp.int32)[:, None]
    y = times_power_of_two(sums.astype(jnp.float32), byte - 256)
    bad = (scale_bytes == 255) | (x.scale_bytes == 255)[:, None]
    return jnp.sum(jnp.where(bad, jnp.float32(jnp.nan), y), axis=-1)


def unpacked(rows: PackedRows, layer: Int32[Array, ""]) -> BFloat16[Array, "rows k"]:
    """The numbers of a layer, of rows that are filled up, too."""
    byte = rows.scale_bytes[layer].astype(jnp.int32)[..., None]
    y = times_power_of_two(decoded(rows, layer).astype(jnp.float32), byte - 128)
    y = jnp.where(byte == 255, jnp.float32(jnp.nan), y).reshape(len(y), -1)
    return y[:, : rows.width].astype(jnp.bfloat16)


def decoded(rows: PackedRows, layer: Int32[Array, ""]) -> Int8[Array, "rows blocks 32"]:
    """Twice the value of each element."""
    packed = jax.lax.bitcast_convert_type(jnp.moveaxis(rows.words[layer], 0, -1), jnp.uint8)
    return doubled(unpack_nibbles(packed.reshape(*packed.shape[:2], 16)))
