"""The few places where Pallas Mosaic GPU differs between the JAX versions that are supported."""

import inspect
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = ["load", "store"]


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
