"""The reference: a block's sums over the two halves of X in int32, exactly; blocks in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from duquantpp_jax.core.arrays import times_power_of_two
from duquantpp_jax.kernels.float_matvec.fixed_point import NOT_FINITE, fixed
from duquantpp_jax.kernels.matvec.reference import decoded
from duquantpp_jax.kernels.matvec.rows import PackedRows
from duquantpp_jax.models.attention import HIGHEST


def matvec(
    x: Float32[Array, "tokens blocks 32"],
    rows: PackedRows,
    layer: Int32[Array, ""],
    bits: int = 24,
) -> Float32[Array, "tokens rows"]:
    """x W^T, of rows that are filled up, too."""
    if rows.matrices is not None:
        x = jnp.einsum("mbi,bij->mbj", x, rows.matrices[layer], precision=HIGHEST)
    (whole, exponent), byte = fixed(x, bits), rows.scale_bytes[layer].astype(jnp.int32)
    w = decoded(rows, layer).astype(jnp.int32)
    high, low = (
        jnp.einsum("mbi,nbi->mnb", half, w).astype(jnp.float32)
        for half in (whole >> 16, whole & 0xFFFF)
    )
    y = times_power_of_two(high * 65536 + low, exponent[:, None] + byte - 159)
    bad = (byte == 255) | (exponent == NOT_FINITE)[:, None]
    return jnp.sum(jnp.where(bad, jnp.float32(jnp.nan), y), axis=-1)
