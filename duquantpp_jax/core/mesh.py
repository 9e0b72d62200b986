"""Arrays on the devices of a mesh, which may be of several processes.

Every process calls these functions with the same arguments, and has the whole of what it gives.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

DATA = "rows"
"""The axis of a mesh that rows are cut along."""


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """A pytree whole on every device."""
    return placed(tree, mesh)


def placed(tree: Any, mesh: Mesh, *axes: str) -> Any:
    """A pytree whose arrays are cut over the devices, along as many axes of theirs as are named.

    >>> mesh = Mesh(np.asarray(jax.devices()[:1]), (DATA,))
    >>> placed(np.ones((4, 2)), mesh, DATA).sharding.spec
    P('rows',)
    """
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def place(leaf: Any) -> Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree)


def gathered(array: Array) -> np.ndarray:
    """An array that is cut over the devices of all processes, whole in each process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(array, tiled=True))
