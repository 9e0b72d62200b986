"""Packed weights in MXFP4: products with few tokens, and their numbers for many."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from duquantpp_jax.core import MXArray, ScaleRule
from duquantpp_jax.formats import MXFP4
from duquantpp_jax.formats.mx import to_float32
from duquantpp_jax.kernels.block_scale import RAISED_ABOVE
from duquantpp_jax.kernels.implementation import choose, why_not_nvidia
from duquantpp_jax.kernels.matvec import move, reference, triton, unpack
from duquantpp_jax.kernels.matvec.rows import PackedRows, in_blocks, is_mxfp4
from duquantpp_jax.kernels.matvec.tokens import Tokens
from duquantpp_jax.models.attention import HIGHEST
from duquantpp_jax.models.prologue import Prologue

Implementation = Literal["triton", "reference"]
FEW = 4
"""Most tokens: with more, decoding the weights once for all of them is faster."""


def matvec(
    x: MXArray,
    rows: PackedRows,
    layer: Int32[Array, ""] | int = 0,
    *,
    implementation: Implementation | None = None,
) -> tuple[Float32[Array, "tokens _n"], ...]:
    """y_i = sum_b 2^(e_b + f_ib) sum_{j in b} x_j w_ij for each linear of `rows`.

    The inner sum is exact, of integers; every implementation has the same, and differs in the order
    in which it adds blocks in float32.

    >>> import jax.numpy as jnp
    >>> from duquantpp_jax import MXFP4
    >>> rows = PackedRows.of([MXFP4().quantize(jnp.ones((1, 8, 64)))])
    >>> (y,) = matvec(MXFP4().quantize(jnp.ones((1, 64))), rows)
    >>> y[0, 0].item()
    64.0

    Args:
      x: At most FEW tokens [m, k] in MXFP4.
      rows: Weights of all layers.
      layer: Which of them to multiply with.
      implementation: "triton" (Pallas, one pass over the packed weights), "reference", or None for
        the first of these that runs here.

    Raises:
      ValueError: Too many tokens, another width or format, or there is no such implementation.
      RuntimeError: The named implementation cannot run here.
    """
    if not is_mxfp4(x) or len(x.shape) != 2 or not 1 <= len(x.elements) <= FEW:
        raise ValueError(
            f"matvec takes 1 to {FEW} tokens [m, k] in MXFP4, not {x.shape} of {x.element.name} "
            f"with {x.scales.dtype} for {x.block_size}"
        )
    if x.shape[1] != rows.width:
        raise ValueError(f"tokens have {x.shape[1]} columns and weights {rows.width}")
    obstacles = {"triton": why_not_nvidia, "reference": lambda: None}
    name = choose("matvec", implementation, obstacles)
    return _product(name, Tokens.of(x, rows), rows, jnp.asarray(layer, jnp.int32))


def _product(
    name: str, x: Tokens, rows: PackedRows, layer: Array, residual: Array | None = None
) -> tuple[Float32[Array, "tokens _n"], ...]:
    if name == "triton":
        return triton.matvec(x, rows, layer, residual)
    ys = rows.split(reference.matvec(x, rows, layer))
    return ys if residual is None else tuple(y + residual for y in ys)


def quantized_matvec(
    x: Float[Array, "tokens k"] | Prologue,
    rows: PackedRows,
    layer: Int32[Array, ""] | int = 0,
    *,
    scale_rule: ScaleRule = ScaleRule.FLOOR,
    implementation: Implementation | None = None,
) -> tuple[Float32[Array, "tokens _n"], ...]:
    """matvec(Q(x M), rows), each block of x moved by its matrix M_b of `rows.matrices`.

    Of a `Prologue` matvec(Q(f(x) M), rows) + residual; "triton" may differ from `applied` in last
    bits, as it adds squares in another order.

    >>> import jax.numpy as jnp
    >>> from duquantpp_jax import MXFP4
    >>> weights = MXFP4().quantize(jnp.ones((1, 8, 64)))
    >>> rows = PackedRows.of([weights], jnp.broadcast_to(jnp.eye(32), (1, 2, 32, 32)))
    >>> quantized_matvec(jnp.ones((1, 64)), rows)[0][0, 0].item()
    64.0

    Args:
      rows, layer, implementation: As for `matvec`; "triton" takes two kernels.
      scale_rule: FLOOR, CEIL, EVEN or RCEIL.

    Raises:
      ValueError: As `matvec`, `rows` has no matrices, or another rule.
      RuntimeError: The named implementation cannot run here.
    """
    if rows.matrices is None or scale_rule not in RAISED_ABOVE:
        raise ValueError(
            "quantized_matvec needs rows with matrices, and one of the rules "
            f"{', '.join(rule.value for rule in RAISED_ABOVE)}: got {scale_rule.value}"
        )
    x = x if isinstance(x, Prologue) else Prologue((x,))
    if not 1 <= x.shape[0] <= FEW or x.shape[1] != rows.width:
        raise ValueError(f"x {x.shape} is not 1 to {FEW} tokens of {rows.width} columns")
    obstacles = {"triton": why_not_nvidia, "reference": lambda: None}
    name = choose("quantized_matvec", implementation, obstacles)
    layer = jnp.asarray(layer, jnp.int32)
    if name == "triton":
        tokens = move.to_tokens(x, rows.matrices, layer, scale_rule)
    else:
        y = in_blocks(to_float32(x.applied()), rows.matrices.shape[1])
        y = jnp.einsum("mbi,bij->mbj", y, rows.matrices[layer], precision=HIGHEST)
        tokens = Tokens.of(MXFP4(scale_rule=scale_rule).encode(y.reshape(len(y), -1)), rows)
    return _product(name, tokens, rows, layer, x.residual)


def unpacked(
    rows: PackedRows,
    layer: Int32[Array, ""] | int = 0,
    *,
    implementation: Implementation | None = None,
) -> BFloat16[Array, "rows k"]:
    """The numbers of all linears of a layer, exact in bfloat16, one below the other.

    Rows that fill up the last program's are zero; `rows.split` leaves them out of a product.

    >>> import jax.numpy as jnp
    >>> from duquantpp_jax import MXFP4
    >>> unpacked(PackedRows.of([MXFP4().quantize(jnp.ones((1, 8, 64)))]))[:8].sum().item()
    512.0

    Args:
      layer, implementation: As for `matvec`.

    Raises:
      ValueError: There is no such implementation.
      RuntimeError: The named implementation cannot run here.
    """
    obstacles = {"triton": why_not_nvidia, "reference": lambda: None}
    name = choose("unpacked", implementation, obstacles)
    run = {"triton": unpack, "reference": reference}[name].unpacked
    return run(rows, jnp.asarray(layer, jnp.int32))
