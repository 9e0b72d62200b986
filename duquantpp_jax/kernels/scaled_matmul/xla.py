"""XLA's own block-scaled product, `jax.lax.scaled_dot`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from duquantpp_jax.kernels.operand import Operand


def why_not() -> str | None:
    """Why lax.scaled_dot does not take four-bit elements; None if it does."""
    if jax.__version_info__ < (0, 11):
        return f"lax.scaled_dot of four-bit elements needs jax 0.11, and this is {jax.__version__}"
    return None


def scaled_matmul(a: Operand, b: Operand, *, out_dtype: Any = jnp.bfloat16) -> Float[Array, "m n"]:
    """a @ b.T; tiles of scales become rows first, which XLA reads."""
    a_mx, b_mx = a.to_mx(), b.to_mx()
    scales = [s for s in (a.tensor_scale, b.tensor_scale) if s is not None]
    out = jax.lax.scaled_dot(
        a_mx.elements,
        b_mx.elements.T,
        lhs_scale=a_mx.scales,
        rhs_scale=b_mx.scales.T,
        preferred_element_type=jnp.float32 if scales else out_dtype,
    )
    for scale in scales:
        out = out * scale
    return out.astype(out_dtype)
