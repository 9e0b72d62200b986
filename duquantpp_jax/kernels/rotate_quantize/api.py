"""Rotation with quantization: MXFP4 of (x / smooth) R, in the layout of `scaled_matmul`; and the
numbers that this stands for, where it is simulated."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.formats import MXFP4
from duquantpp_jax.kernels.implementation import choose, why_not_nvidia, why_not_sm100
from duquantpp_jax.kernels.operand import Operand
from duquantpp_jax.kernels.rotate_quantize import mosaic, reference, triton

Implementation = Literal["mosaic_sm100", "triton", "reference"]
Simulation = Literal["triton", "reference"]


def rotate_quantize(
    x: Float[Array, "m k"],
    rotation: Float[Array, "blocks 32 32"],
    smooth: Float[Array, " _k"] | None = None,
    *,
    scale_rule: ScaleRule = ScaleRule.FLOOR,
    implementation: Implementation | None = None,
) -> Operand:
    """Elements and scales of y_b = (x / smooth)_b R_b for blocks b of 32 columns.

    Given the same y, every implementation gives the same bits, but for the signs of the zeros in
    blocks that are NaN. Their y differ by rounding:
    "reference" divides and multiplies in float32; "mosaic_sm100" multiplies bfloat16 x by the
    matrices diag(1 / smooth_b) R_b in two bfloat16 parts (R to 2^-17) and adds in float32; "triton"
    has three parts of both, which is float32.

    >>> import jax.numpy as jnp
    >>> rotate_quantize(jnp.ones((2, 64)), jnp.eye(32)[None]).shape
    (2, 64)

    Args:
      x: Activations; "mosaic_sm100" takes bfloat16.
      rotation: A matrix for each block, or a single matrix for all; it need not be orthogonal.
      smooth: Divides the columns of x.
      implementation: "mosaic_sm100" (Pallas, compute capability 10.x), "triton" (Pallas, NVIDIA;
        rules FLOOR, CEIL, EVEN and RCEIL), "reference", or None for the first of these that runs
        here.

    Raises:
      ValueError: The width is not a multiple of 32, the rotation or smooth do not fit it, or there
        is no such implementation.
      RuntimeError: The named implementation cannot run here, or not on this input.
    """
    _check(x, rotation, smooth)
    obstacles = {
        "mosaic_sm100": lambda: why_not_sm100() or mosaic.why_not(x.dtype),
        "triton": lambda: why_not_nvidia() or triton.why_not(x, scale_rule),
        "reference": lambda: None,
    }
    name = choose("rotate_quantize", implementation, obstacles)
    run = {"mosaic_sm100": mosaic, "triton": triton, "reference": reference}[name].rotate_quantize
    return run(x, rotation, smooth, scale_rule=scale_rule)


def rotate_fake_quantize(
    x: Float[Array, "m k"],
    rotation: Float[Array, "blocks 32 32"],
    smooth: Float[Array, " _k"] | None = None,
    *,
    scale_rule: ScaleRule = ScaleRule.FLOOR,
    implementation: Simulation | None = None,
) -> BFloat16[Array, "m k"]:
    """The numbers element * 2^E of `rotate_quantize`, which bfloat16 holds exactly.

    >>> import jax.numpy as jnp
    >>> rotate_fake_quantize(jnp.full((2, 64), 5.0), jnp.eye(32)[None])[0, 0].item()
    4.0

    Args:
      x, rotation, smooth: As for `rotate_quantize`.
      implementation: "triton" (one pass over x; NVIDIA, rules FLOOR, CEIL, EVEN and RCEIL),
        "reference", or None for the first of these that runs here.

    Raises:
      ValueError, RuntimeError: As `rotate_quantize`.
    """
    _check(x, rotation, smooth)
    obstacles = {
        "triton": lambda: why_not_nvidia() or triton.why_not(x, scale_rule),
        "reference": lambda: None,
    }
    name = choose("rotate_fake_quantize", implementation, obstacles)
    if name == "triton":
        return triton.numbers(x, triton.joined(rotation, smooth), scale_rule)
    y = reference.in_float32(x, rotation, smooth)
    return MXFP4(scale_rule=scale_rule).fake_quantize(y).astype(jnp.bfloat16)


def _check(x: Array, rotation: Array, smooth: Array | None) -> None:
    """Raises ValueError if operands do not fit each other."""
    k = x.shape[-1]
    if k % 32:
        raise ValueError(f"a width of {k} is not a multiple of block 32: pad to {-(-k // 32) * 32}")
    if rotation.shape not in ((1, 32, 32), (k // 32, 32, 32)):
        raise ValueError(
            f"a width of {k} takes rotations (1, 32, 32) or ({k // 32}, 32, 32): "
            f"got {rotation.shape}"
        )
    if smooth is not None and smooth.shape != (k,):
        raise ValueError(f"smooth must be of shape ({k},): got {smooth.shape}")
