"""Arrays of all layers of which each layer reads its own where they stand.

A scan gives each layer a slice, which XLA fuses into what reads it, or else copies, as it may for a
kernel that it cannot look into; and what each layer gives back it puts into a new array.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
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


def apart(scanned: Any) -> tuple[Any, Callable[[Any, Array], Any]]:
    """What a scan over layers is to slice, and what makes of a slice and its number a layer's.

    The number is to be counted by the scan: one that it slices is a kernel more for each layer.
    """
    parts, tree = jax.tree.flatten(scanned, is_leaf=_is_in_place)

    def join(sliced: list[Any], number: Array) -> Any:
        return tree.unflatten(
            dataclasses.replace(part, layer=number) if _is_in_place(part) else own
            for part, own in zip(parts, sliced, strict=True)
        )

    return [None if _is_in_place(part) else part for part in parts], join


def any_in_place(tree: Any) -> bool:
    """Whether arrays of a pytree are read in place."""
    return any(map(_is_in_place, jax.tree.leaves(tree, is_leaf=_is_in_place)))


def _is_in_place(part: Any) -> bool:
    return isinstance(part, InPlace)
