"""Tokens in float times packed weights in MXFP4: products of W4A16."""

from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from duquantpp_jax.formats.mx import to_float32
from duquantpp_jax.kernels.float_matvec import fixed_point, reference, triton
from duquantpp_jax.kernels.implementation import choose, why_not_nvidia
from duquantpp_jax.kernels.matvec.api import FEW
from duquantpp_jax.kernels.matvec.rows import PackedRows, in_blocks
from duquantpp_jax.models.prologue import Prologue

Implementation = Literal["triton", "reference"]
BITS = {"float32": 24, "bfloat16": 8}
"""Significant bits by type."""


def float_matvec(
    x: Float[Array, "tokens k"] | Prologue,
    rows: PackedRows,
    layer: Int32[Array, ""] | int = 0,
    *,
    dtype: DTypeLike = jnp.float32,
    implementation: Implementation | None = None,
) -> tuple[Float32[Array, "tokens _n"], ...]:
    """y_i = sum_b 2^e_b sum_{j in b} (x_b M_b)_j w_ij for each linear of `rows`.

    M_b are `rows.matrices`, or the identity where there are none. The moved x is taken in fixed
    point of 32 bits for each block, so the inner sum is exact, of integers; every implementation
    has the same, and differs in the order in which it moves x and adds blocks, both in float32. A
    block of x that has NaN or Inf makes y NaN. Of a `Prologue` f(x) is multiplied and the residual
    added; "triton" may differ from `applied` in last bits, as it adds squares in another order.

    >>> import jax.numpy as jnp
    >>> from duquantpp_jax import MXFP4
    >>> rows = PackedRows.of([MXFP4().quantize(jnp.ones((1, 8, 64)))])
    >>> (y,) = float_matvec(jnp.full((1, 64), 0.1), rows)
    >>> round(y[0, 0].item(), 5)
    6.4

    Args:
      x: At most FEW tokens, float32, bfloat16 or float16.
      rows: Weights of all layers.
      layer: Which of them to multiply with.
      dtype: That the moved x is rounded to before: float32, which changes nothing, or bfloat16.
      implementation: "triton" (Pallas: a kernel for the tokens, one for the product, which reads
        the packed weights once), "reference", or None for the first of these that runs here.

    Raises:
      ValueError: Too many tokens, another width or type, or there is no such implementation.
      RuntimeError: The named implementation cannot run here.
    """
    x = x if isinstance(x, Prologue) else Prologue((x,))
    if not 1 <= x.shape[0] <= FEW or x.shape[1] != rows.width:
        raise ValueError(f"x {x.shape} is not 1 to {FEW} tokens of {rows.width} columns")
    if (bits := BITS.get(jnp.dtype(dtype).name)) is None:
        raise ValueError(f"the moved x is rounded to {' or '.join(BITS)}, not {dtype}")
    obstacles = {"triton": why_not_nvidia, "reference": lambda: None}
    name, layer = choose("float_matvec", implementation, obstacles), jnp.asarray(layer, jnp.int32)
    residual = x.residual
    if name == "triton":
        whole = residual if rows.sizes == rows.scale_bytes.shape[1:2] else None
        y = triton.matvec(fixed_point.to_fixed(x, rows, layer, bits), rows, layer, whole)
        residual = residual if whole is None else None
    else:
        tokens = in_blocks(to_float32(x.applied()), rows.scale_bytes.shape[-1])
        y = reference.matvec(tokens, rows, layer, bits)
    ys = rows.split(y)
    return ys if residual is None else tuple(y + residual for y in ys)
