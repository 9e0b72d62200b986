"""Packed MXFP4 of x as bytes, and back."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.kernels.block_scale import RAISED_ABOVE
from duquantpp_jax.kernels.implementation import choose, why_not_nvidia
from duquantpp_jax.kernels.quantize_pack import reference, triton

Implementation = Literal["triton", "reference"]


def quantize_pack(
    x: Float[Array, "*batch k"],
    *,
    scale_rule: ScaleRule = ScaleRule.FLOOR,
    implementation: Implementation | None = None,
) -> reference.Packed:
    """Packed codes and scale bytes of x in MXFP4, blocks of 32 along the last axis.

    Every implementation gives the same bits.

    Args:
      x: float32, bfloat16 or float16; "triton" takes bfloat16.
      scale_rule: "triton" has FLOOR, CEIL, EVEN and RCEIL.
      implementation: "triton" (Pallas, one pass over memory), "reference", or None for the first of
        these that runs here, on this input.

    Raises:
      ValueError: As `Format.quantize`, or there is no such implementation.
      RuntimeError: The named implementation cannot run here, or not on this input.
    """

    def obstacle() -> str | None:
        if reason := why_not_nvidia():
            return reason
        if x.dtype != jnp.bfloat16:
            return f"it takes bfloat16, and x is {x.dtype}"
        if scale_rule not in RAISED_ABOVE:
            return f"it has no rule {scale_rule.value}"
        return None

    name = choose("quantize_pack", implementation, {"triton": obstacle, "reference": lambda: None})
    run = {"triton": triton, "reference": reference}[name].quantize_pack
    return run(x, scale_rule)


def unpack_dequantize(
    packed: UInt8[Array, "*batch bytes"], scale_bytes: UInt8[Array, "*batch blocks"]
) -> Float32[Array, "*batch k"]:
    """element * 2^(byte - 127), exact: subnormals included, Inf beyond 2^128, NaN for byte 255.

    Args:
      packed: Two codes a byte, as `quantize_pack` packs them.

    Raises:
      ValueError: A block does not have 16 bytes and one scale byte.
    """
    *batch, count = scale_bytes.shape
    if packed.shape != (*batch, 16 * count):
        raise ValueError(
            f"packed codes {packed.shape} and scale bytes {scale_bytes.shape} do not belong "
            "together: a block of 32 has 16 bytes and one scale"
        )
    return reference.unpack_dequantize(packed, scale_bytes)
