"""Weights that are larger than a device, cut over the devices of a mesh.

    data groups of model devices:    a group has all of the weights, and rows of its own
    W [out, in]                      out / model rows of W on each device of a group
    y = x W^T                        parts of y, gathered where what follows needs all of it

Every matrix is cut along its outputs, embedding and head along the vocabulary, and every linear
gets its whole input. So no sum over channels is cut: transforms and scales of a whole tensor are
those of one device. (In log softmax the sum over the vocabulary may be added up in another order.)
What is small is whole on every device: norms, biases, routers, transforms, clips.

Source: Shoeybi et al., Megatron-LM (arXiv:1909.08053), section 3, whose second linear of a pair is
cut along its inputs instead.
"""

import contextlib
import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from duquantpp_jax.core.mesh import DATA
from duquantpp_jax.models import Decoder, Linear
from duquantpp_jax.models.parameters import LINEARS
from duquantpp_jax.ptq.plan import linear_shapes
from duquantpp_jax.ptq.site import QuantizedLinear, QuantizedSite

MODEL = "model"
"""The axis of a mesh that matrices are cut along; that of rows, DATA, an option calls data."""


def mesh_of(sizes: str) -> Mesh:
    """The mesh of an option, such as data=2,model=4; an axis that is not named has one device.

    Raises:
      ValueError: It is no such text, or asks for more devices than there are.
    """
    found: dict[str, int] = {}
    for part in sizes.split(","):
        name, _, size = part.strip().partition("=")
        known = name in ("data", "model") and name not in found
        if not (known and size.isascii() and size.isdecimal() and int(size) > 0):
            raise ValueError(f"--mesh {sizes}: give data=N, model=N or both, as in data=2,model=4")
        found[name] = int(size)
    devices, asked = jax.local_devices(), math.prod(found.values())
    if asked > len(devices):
        raise ValueError(
            f"--mesh {sizes} asks for {asked} devices and there are {len(devices)}: give sizes "
            f"whose product is at most that, such as model={len(devices)}"
        )
    shape = found.get("data", 1), found.get("model", 1)
    return Mesh(np.asarray(devices[:asked]).reshape(shape), (DATA, MODEL))


def host_memory(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which what is read for a mesh stays with the host, as no device may have room.

    Raises:
      ValueError: JAX was told to leave the host's processor out.
    """
    if mesh is None:
        return contextlib.nullcontext()
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        raise ValueError(
            "--mesh reads weights into the host's memory, which JAX_PLATFORMS leaves out: add cpu "
            "to it, as in cuda,cpu"
        ) from None


@dataclasses.dataclass(frozen=True)
class CutLinear:
    """A linear whose weights are cut: the input is whole, and the output where it must be.

    Attributes:
      parts: Sites whose outputs stay in parts.
    """

    linear: Linear
    parts: tuple[str, ...]

    def __call__(
        self, site: str, x: Any, weights: tuple[Array, ...], state: Any
    ) -> tuple[tuple[Array, ...], Any]:
        ys, out = self.linear(site, _whole(x), weights, state)
        return ys if site in self.parts else tuple(map(_whole, ys)), out


def cut(mesh: Mesh, model: Decoder, linear: Linear, state: Any) -> tuple[Decoder, Linear, Any]:
    """A model on a mesh, with the linear that it calls and its state.

    The new linear works inside jit, with the mesh set or in a `shard_map` over its rows.

    Raises:
      ValueError: The outputs of a linear cannot be shared evenly.
    """
    size, config = mesh.shape[MODEL], model.config
    outputs = {name: shape[0] for name, shape in linear_shapes(config).items()}
    if wrong := [name for name in LINEARS if outputs[name] % size]:
        raise ValueError(
            f"--mesh model={size}: {wrong[0]} has {outputs[wrong[0]]} outputs, and {size} devices "
            f"cannot share them: give a divisor of {math.gcd(*outputs.values())}"
        )

    def put(array: Array, *axes: str | None) -> Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))

    def in_rows(array: Array) -> Array:
        """Cut along the outputs, the last axis but one; whole where it is no stack of matrices."""
        return put(array, *[None] * (array.ndim - 2), *[MODEL] * (array.ndim > 2))

    def in_vocabulary(table: nnx.Param) -> nnx.Param:
        return nnx.Param(put(table[...], *[MODEL] * (config.vocab_size % size == 0)))

    moved = jax.tree.map(lambda leaf: leaf, model)
    for name, array in model.layers.items():
        moved.layers[name] = nnx.Param((in_rows if name in LINEARS else put)(array[...]))
    moved.embedding, moved.norm = in_vocabulary(model.embedding), nnx.Param(put(model.norm[...]))
    moved.head = None if model.head is None else in_vocabulary(model.head)

    def of_site(site: Any) -> Any:
        if not isinstance(site, QuantizedSite):
            return jax.tree.map(put, site)
        weights = jax.tree.map(in_rows, site.weights)
        return dataclasses.replace(jax.tree.map(put, site), weights=weights)

    state = jax.tree.map(of_site, state, is_leaf=lambda part: isinstance(part, QuantizedSite))
    heads = ("attention_in",) * (config.num_key_value_heads % size == 0)
    if isinstance(linear, QuantizedLinear):  # a kernel is not cut
        linear = dataclasses.replace(linear, implementation="xla")
    return moved, CutLinear(linear, ("mlp_in", *heads)), state


def _whole(tree: Any) -> Any:
    """Inside jit: a pytree whole on every device of a group."""
    put = jax.lax.with_sharding_constraint
    return jax.tree.map(lambda array: put(array, PartitionSpec()), tree)
