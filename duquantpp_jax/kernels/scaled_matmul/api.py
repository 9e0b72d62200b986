"""Block-scaled matmul: out = a @ b.T for quantized a [m, k] and b [n, k]."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from duquantpp_jax.core import MXArray
from duquantpp_jax.kernels.implementation import choose, current_device, why_not_sm100
from duquantpp_jax.kernels.operand import Operand
from duquantpp_jax.kernels.scaled_matmul import mosaic, reference, xla

Implementation = Literal["mosaic_sm100", "xla", "reference"]

NATIVE = {  # (element, scale, block): what block-scaled tensor cores multiply
    ("float4_e2m1fn", "float8_e8m0fnu", 32): "MXFP4",
    ("float4_e2m1fn", "float8_e4m3fn", 16): "NVFP4",
    ("float8_e4m3fn", "float8_e8m0fnu", 32): "MXFP8",
    ("float8_e5m2", "float8_e8m0fnu", 32): "MXFP8",
}


def scaled_matmul(
    a: Operand | MXArray,
    b: Operand | MXArray,
    *,
    out_dtype: Any = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, "m n"]:
    """out[i, j] = sum_k a[i, k] b[j, k] of scaled values, accumulated in float32.

    >>> import jax.numpy as jnp
    >>> from duquantpp_jax import MXFP4
    >>> a, b = MXFP4().quantize(jnp.ones((2, 64))), MXFP4().quantize(jnp.ones((8, 64)))
    >>> scaled_matmul(a, b)[0, 0].item()
    64.0

    Args:
      a: Activations [m, k] in MXFP4, NVFP4 or MXFP8. An MXArray costs a pass over memory, which
        lays it out for tensor cores; an Operand does not.
      b: Weights [n, k] in the same format.
      out_dtype: bfloat16 or float32.
      implementation: "mosaic_sm100" (Pallas, compute capability 10.x), "xla" (lax.scaled_dot),
        "reference" (dequantize and multiply), or None for the first of these that runs here
        ("reference" on CPUs).

    Raises:
      ValueError: Widths or formats differ, tensor cores do not have the format or out_dtype, or
        there is no such implementation.
      RuntimeError: The named implementation cannot run here.
    """
    a, b = (x if isinstance(x, Operand) else Operand.from_mx(x) for x in (a, b))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a has K = {a.shape[1]} and b has K = {b.shape[1]}: they must be equal")
    kinds = [(x.elements.dtype.name, x.scales.dtype.name, x.block_size) for x in (a, b)]
    for kind in kinds:
        if kind not in NATIVE:
            raise ValueError(f"(elements, scales, block) = {kind}: must be one of {[*NATIVE]}")
    first, second = (NATIVE[kind] for kind in kinds)
    if first != second:
        raise ValueError(f"a is {first} and b is {second}: tensor cores want one format")
    if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"out_dtype is {jnp.dtype(out_dtype)}: must be bfloat16 or float32")
    obstacles = {"mosaic_sm100": why_not_sm100, "xla": xla.why_not, "reference": lambda: None}
    if current_device().platform == "cpu":  # XLA's form gains nothing there
        obstacles = dict(reversed(obstacles.items()))
    name = choose("scaled_matmul", implementation, obstacles)
    run = {"mosaic_sm100": mosaic, "xla": xla, "reference": reference}[name].scaled_matmul
    return run(a, b, out_dtype=out_dtype)
