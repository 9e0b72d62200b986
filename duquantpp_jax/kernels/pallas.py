"""Parts of Pallas Mosaic GPU that both kernels use, and its differences between versions of JAX."""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu


def launch(body: Callable[..., None], interpret: Any, ctas: int, scratch: Any, **more: Any) -> Any:
    """A Mosaic kernel on `ctas` CTAs or clusters; its last argument `s` is the scratch memory."""
    # Register layouts are explicit where they matter, not inferred (jax 0.12's default).
    lanes = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
    more |= {"grid": (ctas,), "grid_names": ("sm",), "thread_name": "wg"}
    more |= {"scratch_types": {"s": scratch}, "compiler_params": lanes}
    return plgpu.kernel(body, **more if interpret is None else more | {"interpret": interpret})


def swizzled(shape: tuple[int, ...], dtype: Any, columns: int | None = None) -> Any:
    """Shared memory in tiles of 8 swizzled rows, which TMA writes and the tensor core reads.

    Args:
      columns: Columns of a tile; default the last axis. At most 128 bytes are used.
    """
    bits = jnp.finfo(dtype).bits
    swizzle = plgpu.find_swizzle((columns or shape[-1]) * bits)
    tile = (8, swizzle * 8 // bits)
    transforms = (
        plgpu.TilingTransform(tile),  # type: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # type: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def loop(start: Any, stop: Any, body: Callable[[Any], None]) -> None:
    """A loop with int32 counters and no carried value."""
    lax.fori_loop(jnp.int32(start), jnp.int32(stop), lambda i, _: body(i), None)


def wait_for_last(barriers: Any, last: int, count: Any, slots: int) -> None:
    """Waits for the last of `count` arrivals, which visit a ring of barriers in turn.

    No warp may leave while the tensor core can still arrive on a barrier.
    """

    def wait(i: Any) -> None:
        plgpu.barrier_wait(barriers.at[lax.rem(i, jnp.int32(slots))])

    loop(lax.max(count - last, 0), count, wait)


def load(ref: Any, layout: Any) -> Any:
    """Loads shared memory into any register layout, with bank conflicts where there are some."""
    # jax 0.10 asks for an index, 0.11 does not want one, 0.12 has none.
    idx = inspect.signature(plgpu.load).parameters.get("idx")
    index = ((),) if idx is not None and idx.default is inspect.Parameter.empty else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def store(ref: Any, value: Any) -> None:
    """Stores registers of any layout to shared memory, with bank conflicts where there are some."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:  # jax 0.10: a plain store allows it
        ref[...] = value
