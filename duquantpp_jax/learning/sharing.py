"""The rows of a batch: shared by devices, and on each taken in parts.

    loss, gradient = mean over devices, and over the parts of each, of (L, dL)(rows of the part)

L is a mean over rows and all parts have as many, so that this is the loss and the gradient of the
whole batch, but for the order of sums. One part at a time is in memory. The model and what learns
are whole on every device; of what is exchanged there is only the gradient of what learns. (A format
whose scale spans a tensor, as log256, sees a part alone: there the parts belong to the result.)

Source: Goyal et al., arXiv:1706.02677, section 3, for data-parallel steps.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from duquantpp_jax.core.mesh import DATA, everywhere

WHOLE, ROWS = PartitionSpec(), PartitionSpec(DATA)


class Sharing(NamedTuple):
    """How a batch is shared.

    Attributes:
      mesh: Its devices share the rows.
      parts: Of the rows of a device, one after the other.
    """

    mesh: Mesh
    parts: int

    @classmethod
    def of(cls, batch_rows: int, parts: int, devices: Sequence[Any] | None = None) -> "Sharing":
        """Over as many devices as can have the same number of rows.

        >>> Sharing.of(16, 4).parts
        4

        Args:
          devices: Those of all processes by default; of each as many are used.

        Raises:
          ValueError: The batch has no such parts, or the processes cannot share one.
        """
        if parts < 1 or batch_rows % parts:
            raise ValueError(
                f"a batch of {batch_rows} rows cannot be taken in {parts} parts of as many: give "
                "--accumulate a divisor of --batch-rows"
            )
        rows = batch_rows // parts
        devices = list(devices or jax.devices())
        processes = sorted({device.process_index for device in devices})
        own = [[d for d in devices if d.process_index == process] for process in processes]
        most = min(map(len, own))
        counts = [n for n in range(1, most + 1) if rows % (n * len(processes)) == 0]
        if not counts:
            raise ValueError(
                f"{len(processes)} processes cannot share {rows} rows of a step: give "
                f"--batch-rows a multiple of {len(processes) * parts}"
            )
        chosen = [device for some in own for device in some[: counts[-1]]]
        return cls(Mesh(np.asarray(chosen), (DATA,)), parts)

    def put(self, tree: Any) -> Any:
        """A pytree that is whole on every device."""
        return everywhere(tree, self.mesh)

    def rows(self, batch_rows: int) -> int:
        """Rows of a batch that a device has at once."""
        return batch_rows // (self.mesh.size * self.parts)


def mean_loss(objective: Any, learned: Any, batch: Any, sharing: Sharing) -> Float[Array, ""]:
    """Inside jit: the loss of a batch."""
    return _mean(_loss, jnp.float32(0), objective, learned, batch, sharing)


def value_and_grad(
    objective: Any, learned: Any, batch: Any, sharing: Sharing
) -> tuple[Float[Array, ""], Any]:
    """Inside jit: the loss of a batch, and its gradient."""
    nothing = jnp.float32(0), jax.tree.map(jnp.zeros_like, learned)
    return _mean(_loss_and_gradient, nothing, objective, learned, batch, sharing)


def _loss(objective: Any, learned: Any, rows: Any) -> Float[Array, ""]:
    return objective.loss(learned, rows)


def _loss_and_gradient(objective: Any, learned: Any, rows: Any) -> tuple[Float[Array, ""], Any]:
    return jax.value_and_grad(lambda learned: objective.loss(learned, rows))(learned)


def _mean(
    of_rows: Callable[[Any, Any, Any], Any],
    nothing: Any,
    objective: Any,
    learned: Any,
    batch: Any,
    sharing: Sharing,
) -> Any:
    """The mean of what a function gives for the rows of every part; sums begin with `nothing`."""
    mesh, parts = sharing

    def of_device(nothing: Any, objective: Any, learned: Any, rows: Any) -> Any:
        if parts == 1:
            return jax.lax.pmean(of_rows(objective, learned, rows), DATA)
        cut = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), rows)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, of_rows(objective, learned, part)), None

        total, _ = jax.lax.scan(add, nothing, cut)
        return jax.lax.pmean(jax.tree.map(lambda a: a / np.asarray(parts, a.dtype), total), DATA)

    specs = {"in_specs": (WHOLE, WHOLE, WHOLE, ROWS), "out_specs": WHOLE}
    mapped = jax.shard_map(of_device, mesh=mesh, **specs, check_vma=False)
    return mapped(nothing, objective, learned, batch)


def home(tree: Any) -> Any:
    """What is whole on every device, on the first of this process."""
    return jax.tree.map(lambda array: array.addressable_data(0), tree)


def kept_bytes(objective: Any, learned: Any, rows: Any) -> int:
    """Bytes that the forward pass keeps for the backward pass, and of what is given to both.

    XLA may keep less. Nothing is computed.

    Args:
      rows: Those that a device has at once; shapes suffice.
    """

    def kept(objective: Any, learned: Any, rows: Any) -> Any:
        return jax.vjp(lambda learned: objective.loss(learned, rows), learned)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, objective, learned, rows))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def memory_of(device: Any) -> int | None:
    """Bytes of an accelerator's memory; None of a CPU."""
    stats = None if device.platform == "cpu" else device.memory_stats()
    return None if stats is None else stats["bytes_limit"]
