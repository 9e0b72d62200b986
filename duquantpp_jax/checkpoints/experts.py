"""Experts in a checkpoint: many tensors, or parts of one, are viewed as the stack of a layer.

    model.layers.3.block_sparse_moe.experts.*.w3.weight    ->  model.layers.3.mlp.up_proj.weight
    model.layers.3.mlp.experts.gate_up_proj, odd columns   ->  the same
    model.layers.3.mlp.experts.gate_up_proj_blocks and _scales, odd rows  ->  the same

A view has a shard, a shape and a dtype, and `read`, as a tensor has; nothing is read before that.
Which tensor has what is said by the family (`families.base.In`). A weight, of an expert or of
another linear, may be packed (mxfp4.py); it is a view, too, which also gives the packed numbers.

Source: transformers 5.24, conversion_mapping.py.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from duquantpp_jax.checkpoints.mxfp4 import BLOCKS, SCALES, Packing, array_of, packing_of
from duquantpp_jax.checkpoints.shards import Stored
from duquantpp_jax.core import MXArray
from duquantpp_jax.models.config import DecoderConfig
from duquantpp_jax.models.families import FAMILIES
from duquantpp_jax.models.families.base import In
from duquantpp_jax.models.parameters import LINEARS, layer_prefix, tensor_name

FLOATS = ("BF16", "F16", "F32")
_WEIGHTS = tuple(map(tensor_name, LINEARS))


class View(NamedTuple):
    """A tensor that is made of stored ones when it is read.

    Attributes:
      packed: Gives the packed numbers; None where they are floats.
    """

    shard: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Float[np.ndarray, "..."]]
    packed: Callable[[], MXArray] | None = None


class Wanted(NamedTuple):
    """What a tensor of a checkpoint must be."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS


def wanted(
    config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Stored]
) -> dict[str, Wanted]:
    """The tensors that a checkpoint must have for those of a model, by what is found there."""
    tensors = {name: Wanted(shape) for name, shape in shapes.items()}
    for name, at, stored in (*_stored(config), *_own(config)):
        shape = tensors.pop(name).shape
        if (packing := _packing(name, stored, found)) is None:
            tensors |= dict.fromkeys(stored, Wanted(_whole(shape, at)))
            continue
        types = packing.types()
        both = packing.shapes(_whole(shape, at._replace(transposed=False)))
        for tensor in stored:
            tensors |= zip(packing.names(tensor), map(Wanted, both, types), strict=True)
    return tensors


def views(config: DecoderConfig, found: Mapping[str, Stored]) -> dict[str, Stored | View]:
    """The tensors of a model, of those of a checkpoint, which are as `wanted`."""
    seen: dict[str, Stored | View] = dict(found)
    for name, at, stored in (*_stored(config), *_own(config)):
        packing = _packing(name, stored, found)
        if packing is None and stored == [name]:
            continue
        names = [packing.names(tensor) if packing else (tensor,) for tensor in stored]
        parts = [[found[tensor] for tensor in each] for each in names]
        for each in names:
            for tensor in each:
                seen.pop(tensor, None)
        first = parts[0][0]
        if packing is None:
            shape, kind, packed = _part(first.shape, at, len(parts)), first.dtype, None
            read = functools.partial(_read, [part for (part,) in parts], at)
        else:
            rows = at._replace(transposed=False)
            *outputs, blocks = _part(parts[0][1].shape, rows, len(parts))
            shape = (*outputs, packing.block * blocks)
            kind = "F32" if packing.whole else "BF16"
            packed = functools.partial(_decode, name, parts, rows)
            read = functools.partial(_dequantized, packed)
        seen[name] = View(first.shard, shape, kind, read, packed)
    return seen


def tensors_of(config: DecoderConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a model, or of some of its layers, as a checkpoint has them.

    Packed ones have the name of theirs with _blocks or _scales behind it, and rows of outputs.
    """
    made = dict(tensors)
    for name, at, stored in _stored(config):
        for end in ("", BLOCKS, SCALES):
            if (array := made.pop(name + end, None)) is None:
                continue
            if "*" in at.tensor:
                made |= dict(zip(stored, array, strict=True))
                continue
            here = at._replace(transposed=at.transposed and not end)
            empty = np.empty(_whole(array.shape, here), array.dtype)
            _rows(made.setdefault(stored[0] + end, empty), here)[...] = array
    return made


def linears(config: DecoderConfig) -> dict[str, list[str]]:
    """The linears of a checkpoint that each linear of a model is, or is made of."""
    named = {name: stored for name, _, stored in (*_stored(config), *_own(config))}
    return {
        name.removesuffix(".weight"): [tensor.removesuffix(".weight") for tensor in stored]
        for name, stored in named.items()
        if name.endswith(_WEIGHTS)
    }


def _stored(config: DecoderConfig) -> Iterator[tuple[str, In, list[str]]]:
    """Name of each tensor that is stored otherwise, where it is, and the names there."""
    experts = FAMILIES[config.architecture].experts
    for number in range(config.num_hidden_layers):
        prefix = layer_prefix(number)
        for name, at in ({} if experts is None else experts.stored).items():
            each = range(config.num_experts if "*" in at.tensor else 1)
            yield prefix + name, at, [prefix + at.tensor.replace("*", str(e)) for e in each]


def _own(config: DecoderConfig) -> Iterator[tuple[str, In, list[str]]]:
    """As `_stored`, of the other linears, which are stored by their own names."""
    experts = FAMILIES[config.architecture].experts
    names = {tensor_name(name) for name in LINEARS} - {*(experts.stored if experts else ())}
    for number in range(config.num_hidden_layers):
        for name in (layer_prefix(number) + name for name in sorted(names)):
            yield name, In(name), [name]


def _packing(name: str, stored: list[str], found: Mapping[str, Stored]) -> Packing | None:
    return packing_of(stored[0], found) if name.endswith(_WEIGHTS) else None


def _rows(tensor: np.ndarray, at: In) -> np.ndarray:
    """The parameter inside its tensor."""
    turned = tensor.swapaxes(1, 2) if at.transposed else tensor
    return turned[:, at.first :: at.step] if at.step > 1 else turned


def _whole(shape: tuple[int, ...], at: In) -> tuple[int, ...]:
    """The shape of the tensor that a parameter of a shape is in, or of each of its tensors."""
    if "*" in at.tensor:
        return shape[1:]
    if at.step == 1 and not at.transposed:
        return shape
    experts, rows, *columns = shape
    sizes = (at.step * rows, *columns)
    return (experts, *(sizes[::-1] if at.transposed else sizes))


def _part(shape: tuple[int, ...], at: In, count: int) -> tuple[int, ...]:
    """The shape of a parameter that is in a tensor of a shape, or in `count` of them."""
    if "*" in at.tensor:
        return (count, *shape)
    if at.step == 1 and not at.transposed:
        return shape
    experts, rows, *columns = (shape[0], *shape[:0:-1]) if at.transposed else shape
    return (experts, rows // at.step, *columns)


def _read(parts: list[Stored], at: In) -> np.ndarray:
    arrays = [part.read() for part in parts]
    return np.stack(arrays) if "*" in at.tensor else np.ascontiguousarray(_rows(arrays[0], at))


def _decode(name: str, parts: list[list[Stored]], at: In) -> MXArray:
    """The numbers of codes and scales."""
    return array_of(name, *(_read(list(each), at) for each in zip(*parts, strict=True)))


def _dequantized(packed: Callable[[], MXArray]) -> np.ndarray:
    """In bfloat16, which holds E2M1 times a power of two exactly; of NVFP4 in float32."""
    array = packed()
    exact = jnp.bfloat16 if array.tensor_scale is None else jnp.float32
    return np.asarray(array.dequantize().astype(exact))
