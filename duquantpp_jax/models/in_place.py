"""Arrays of all layers of which each layer reads its own where they stand.

A scan gives each layer a slice, which XLA fuses into what reads it, or else copies, as it may for a
kernel that it cannot look into; and what each layer gives back it puts into a new array.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int32


@struct.dataclass
class InPlace:
    """A pytree of arrays with a leading layer axis.

    Attributes:
      layer: Which layer is meant, once a scan has come to it.
    """

    arrays: Any
    layer: Int32[Array, ""] | Any = None

    def own(self) -> Any:
        """The layer's slice."""
        return jax.tree.map(lambda array: array[self.layer], self.arrays)


def apart(scanned: Any, count: int) -> tuple[Any, Callable[[Any], Any]]:
    """What a scan over so many layers is to slice, and what makes of a slice that of a layer."""
    parts, tree = jax.tree.flatten(scanned, is_leaf=_is_in_place)
    layers = jnp.arange(count, dtype=jnp.int32)

    def join(sliced: list[Any]) -> Any:
        return tree.unflatten(
            dataclasses.replace(part, layer=own) if _is_in_place(part) else own
            for part, own in zip(parts, sliced, strict=True)
        )

    return [layers if _is_in_place(part) else part for part in parts], join


def _is_in_place(part: Any) -> bool:
    return isinstance(part, InPlace)
