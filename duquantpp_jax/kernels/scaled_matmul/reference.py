"""The reference for every implementation: dequantize both sides, multiply in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from duquantpp_jax.kernels.operand import Operand


def scaled_matmul(a: Operand, b: Operand, *, out_dtype: Any = jnp.bfloat16) -> Float[Array, "m n"]:
    """a @ b.T of the dequantized operands."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.matmul(a.dequantize(), b.dequantize().T, precision=highest).astype(out_dtype)
