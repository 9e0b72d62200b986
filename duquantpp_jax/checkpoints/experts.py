"""Experts in a checkpoint: many tensors, or parts of one, are viewed as the stack of a layer.

    model.layers.3.block_sparse_moe.experts.*.w3.weight    ->  model.layers.3.mlp.up_proj.weight
    model.layers.3.mlp.experts.gate_up_proj, odd columns   ->  the same

A view has a shard, a shape and a dtype, and `read`, as a tensor has; nothing is read before that.
Which tensor has what is said by the family (`models.experts.In`).
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from duquantpp_jax.checkpoints.shards import Stored
from duquantpp_jax.models.config import DecoderConfig
from duquantpp_jax.models.experts import In
from duquantpp_jax.models.parameters import layer_prefix


class View(NamedTuple):
    """A tensor that is made of stored ones when it is read."""

    shard: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Float[np.ndarray, "..."]]


Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of tensors by their names."""


def stored_shapes(config: DecoderConfig, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint has for these of a model."""
    found = dict(shapes)
    for name, at, tensors in _stored(config):
        shape = found.pop(name)
        for tensor in tensors:
            found[tensor] = shape[1:] if "*" in at.tensor else _whole(shape, at)
    return found


def views(config: DecoderConfig, found: Mapping[str, Stored]) -> dict[str, Stored | View]:
    """The tensors of a model, of those that a checkpoint has, whose shapes are right."""
    seen: dict[str, Stored | View] = dict(found)
    for name, at, tensors in _stored(config):
        parts = [found[tensor] for tensor in tensors]
        for tensor in tensors:
            seen.pop(tensor, None)
        first, read = parts[0], functools.partial(_read, parts, at)
        shape = (len(parts), *first.shape) if "*" in at.tensor else _part(first.shape, at)
        seen[name] = View(first.shard, shape, first.dtype, read)
    return seen


def tensors_of(config: DecoderConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a model as a checkpoint has them."""
    made = dict(tensors)
    for name, at, stored in _stored(config):
        if (array := made.pop(name, None)) is None:  # of another layer
            continue
        if "*" in at.tensor:
            made |= dict(zip(stored, array, strict=True))
            continue
        whole = made.setdefault(stored[0], np.empty(_whole(array.shape, at), array.dtype))
        _rows(whole, at)[...] = array
    return made


def _stored(config: DecoderConfig) -> Iterator[tuple[str, In, list[str]]]:
    """Name of each tensor that is stored otherwise, where it is, and the names there."""
    experts = config.family.experts
    for number in range(config.num_hidden_layers):
        prefix = layer_prefix(number)
        for name, at in ({} if experts is None else experts.stored).items():
            each = range(config.num_experts if "*" in at.tensor else 1)
            yield prefix + name, at, [prefix + at.tensor.replace("*", str(e)) for e in each]


def _rows(tensor: np.ndarray, at: In) -> np.ndarray:
    """The parameter inside its tensor."""
    turned = tensor.swapaxes(1, 2) if at.transposed else tensor
    return turned[:, at.first :: at.step]


def _whole(shape: tuple[int, ...], at: In) -> tuple[int, ...]:
    """The shape of the tensor that a parameter of a shape is in."""
    experts, rows, *columns = shape
    sizes = (at.step * rows, *columns)
    return (experts, *(sizes[::-1] if at.transposed else sizes))


def _part(shape: tuple[int, ...], at: In) -> tuple[int, ...]:
    """The shape of a parameter that is in a tensor of a shape."""
    experts, rows, *columns = (shape[0], *shape[:0:-1]) if at.transposed else shape
    return (experts, rows // at.step, *columns)


def _read(parts: list[Stored], at: In) -> np.ndarray:
    arrays = [part.read() for part in parts]
    return np.stack(arrays) if "*" in at.tensor else np.ascontiguousarray(_rows(arrays[0], at))
