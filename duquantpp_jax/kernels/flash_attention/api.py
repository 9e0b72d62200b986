"""Causal attention whose scores are never in memory: of prompts, and of rows that are evaluated."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from duquantpp_jax.kernels.decode_attention.api import EVERYTHING
from duquantpp_jax.kernels.flash_attention import reference, triton
from duquantpp_jax.kernels.implementation import choose, current_device, why_not_nvidia

Implementation = Literal["triton", "reference"]
MEASURED = 9
"""The compute capability (its first number) on which the kernel was measured: Hopper's."""


def flash_attention(
    q: Float[Array, "rows length kv_heads groups d"],
    k: Float[Array, "rows keys kv_heads d"],
    v: Float[Array, "rows keys kv_heads d"],
    positions: Int32[Array, "*rows length"],
    window: Int32[Array | np.ndarray, ""] | int | None,
    scalar: float,
    sinks: Float[Array, "kv_heads groups"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "rows length kv_heads groups d"]:
    """`causal_attention` of consecutive positions, with its arguments and its derivatives.

    Sums and softmax are in float32. Products of factors in float32 are those of three parts in
    bfloat16; with bfloat16 the weights of softmax are rounded to bfloat16 before they multiply the
    values, in "triton" before they are divided by their sum.

    >>> import jax.numpy as jnp
    >>> q, k = jnp.ones((2, 20, 1, 4, 16)), jnp.ones((2, 20, 1, 16))
    >>> flash_attention(q, k, k, jnp.arange(20), None, 16.0).shape
    (2, 20, 1, 4, 16)

    Args:
      positions: Of the queries; those of a row follow one another.
      implementation: "triton" (Pallas, NVIDIA: one kernel), "reference", or None: "triton" on
        Hopper, where it was measured, if it takes these shapes. Derivatives are the reference's.

    Raises:
      ValueError: There is no such implementation.
      RuntimeError: The named implementation cannot run here, or not on these shapes.
    """
    here = why_not_by_default if implementation is None else why_not_nvidia
    obstacles = {"triton": lambda: here() or why_not(q, k, v), "reference": lambda: None}
    name = choose("flash_attention", implementation, obstacles)
    first = jnp.broadcast_to(positions[..., 0], q.shape[:1])
    seen = jnp.asarray(EVERYTHING if window is None else window, jnp.int32)
    given = q, k, v, first, seen, sinks
    by_reference = functools.partial(reference.flash_attention, scale=scalar**-0.5)
    if name == "reference":
        return by_reference(*given)
    kernel: Any = functools.partial(_in_kernel, scalar**-0.5)
    if implementation == "triton":
        return kernel(*given)
    return jax.lax.platform_dependent(*given, cuda=kernel, default=by_reference)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_kernel(
    scale: float, q: Array, k: Array, v: Array, first: Array, window: Array, sinks: Array | None
) -> Array:
    tiling = triton.tiling(q.dtype, q.shape[-1], hopper=_capability() == 9)
    return triton.flash_attention(q, k, v, first, window, sinks, scale, tiling)


def _backward(scale: float, given: tuple[Any, ...], g: Array) -> tuple[Any, ...]:
    q, k, v, first, window, sinks = given

    def run(q: Array, k: Array, v: Array, sinks: Array | None) -> Array:
        return reference.flash_attention(q, k, v, first, window, sinks, scale)

    dq, dk, dv, dsinks = jax.vjp(run, q, k, v, sinks)[1](g)
    return dq, dk, dv, None, None, dsinks


_in_kernel.defvjp(lambda scale, *given: (_in_kernel(scale, *given), given), _backward)


def why_not_by_default() -> str | None:
    """Why "triton" does not run here unless it is named; None if it does."""
    if (reason := why_not_nvidia()) is not None:
        return reason
    if (capability := _capability()) != MEASURED:
        return f"unasked it runs on compute capability {MEASURED}.x, and this is {capability}.x"
    return None


def obstacle(length: int, d: int, dtype: DTypeLike) -> str | None:
    """Why "triton" cannot run here on rows of so many positions and heads of width d, or None."""
    q, k = (jax.ShapeDtypeStruct((1, length, *heads, d), dtype) for heads in ((1, 1), (1,)))
    return why_not_nvidia() or why_not(q, k, k)


def why_not(q: Any, k: Any, v: Any) -> str | None:
    """Why the kernel is not for such factors; None if it is."""
    length, d = q.shape[1], q.shape[-1]
    if q.dtype not in triton.WIDEST or not q.dtype == k.dtype == v.dtype:
        return f"it takes float32 or bfloat16, the same of all: got {q.dtype}, {k.dtype}, {v.dtype}"
    widest = triton.WIDEST[q.dtype]
    if not triton.LEAST <= d <= widest or d & (d - 1):
        return f"heads of {d} are no power of two from {triton.LEAST} to {widest}"
    if length < triton.LEAST:
        return f"it is for {triton.LEAST} queries and more: got {length}"
    if (capability := _capability()) < 8:
        return f"it needs compute capability 8.0 or more, and this is {capability}.x"
    return None


def _capability() -> int:
    """The first number of the device's compute capability; that of Hopper where there is none."""
    return int(str(getattr(current_device(), "compute_capability", "9.0")).split(".")[0])
