"""Pallas Mosaic GPU as both kernels use it, and the places where versions of JAX differ in it."""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from duquantpp_jax.kernels.operand import bits_of

__all__ = ["LANE_SEMANTICS", "load", "loop", "store", "swizzled"]

# Layouts of registers are written down where they matter, not inferred (the default from jax 0.12).
LANE_SEMANTICS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def swizzled(shape: tuple[int, ...], dtype: Any, columns: int | None = None) -> Any:
    """Shared memory in tiles of 8 swizzled rows, which TMA writes and the tensor core reads.

    Args:
      columns: Of a tile; the last axis of the shape if not given, or what 128 bytes hold of it.
    """
    swizzle = plgpu.find_swizzle((columns or shape[-1]) * bits_of(dtype))
    tile = (8, swizzle * 8 // bits_of(dtype))
    transforms = (
        plgpu.TilingTransform(tile),  # type: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # type: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def loop(start: Any, stop: Any, body: Callable[[Any], None]) -> None:
    """A loop with int32 counters that carries nothing."""
    lax.fori_loop(jnp.int32(start), jnp.int32(stop), lambda i, _: body(i), None)


def load(ref: Any, layout: Any) -> Any:
    """Loads shared memory in a register layout of any access pattern, conflicts included."""
    # jax 0.10 asks for an index, 0.11 does not want one, 0.12 has none.
    idx = inspect.signature(plgpu.load).parameters.get("idx")
    index = ((),) if idx is not None and idx.default is inspect.Parameter.empty else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def store(ref: Any, value: Any) -> None:
    """Stores registers to shared memory with any access pattern, conflicts included."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:  # jax 0.10: a plain store allows it
        ref[...] = value
