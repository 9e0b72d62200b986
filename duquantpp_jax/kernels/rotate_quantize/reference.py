"""The reference for every implementation: divide, rotate in float32, quantize, lay out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.formats import MXFP4
from duquantpp_jax.kernels.operand import Operand


def rotate_quantize(
    x: Float[Array, "m k"], rotation: Array, smooth: Array | None, *, scale_rule: ScaleRule
) -> Operand:
    """MXFP4 of (x / smooth)_b R_b."""
    return Operand.from_mx(MXFP4(scale_rule=scale_rule).quantize(in_float32(x, rotation, smooth)))


def in_float32(
    x: Float[Array, "m k"], rotation: Array, smooth: Array | None
) -> Float32[Array, "m k"]:
    """(x / smooth)_b R_b in float32."""
    m, k = x.shape
    x = x.astype(jnp.float32)
    if smooth is not None:
        x = x / smooth
    blocks = jnp.broadcast_to(rotation, (k // 32, 32, 32))
    highest = jax.lax.Precision.HIGHEST
    y = jnp.einsum("mbi,bij->mbj", x.reshape(m, -1, 32), blocks, precision=highest)
    return y.reshape(m, k)
