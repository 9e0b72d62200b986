"""Experts in a checkpoint: many tensors, or parts of one, are viewed as the stack of a layer.

    model.layers.3.block_sparse_moe.experts.*.w3.weight    ->  model.layers.3.mlp.up_proj.weight
    model.layers.3.mlp.experts.gate_up_proj, odd columns   ->  the same
    model.layers.3.mlp.experts.gate_up_proj_blocks and _scales, odd rows  ->  the same

A view has a shard, a shape and a dtype, and `read`, as a tensor has; nothing is read before that.
Which tensor has what is said by the family (`families.base.In`). A tensor T may be packed MXFP4,

    T_blocks   uint8 [experts, out, in / 32, 16]     two codes of E2M1 a byte, lower index low
    T_scales   uint8 [experts, out, in / 32]         E8M0

and its view then gives the packed numbers, too.

Source: transformers 5.24, conversion_mapping.py for names, integrations/mxfp4.py for MXFP4.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from duquantpp_jax.checkpoints.shards import Stored
from duquantpp_jax.core import MXArray
from duquantpp_jax.formats.tensors import from_tensors
from duquantpp_jax.models.config import DecoderConfig
from duquantpp_jax.models.families import FAMILIES
from duquantpp_jax.models.families.base import In
from duquantpp_jax.models.parameters import layer_prefix

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32
METHOD = "mxfp4"
"""What config.json calls the packing, as quant_method."""
FLOATS = ("BF16", "F16", "F32")


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
    for name, at, stored in _stored(config):
        shape = tensors.pop(name).shape
        if not _is_packed(stored[0], found):
            whole = shape[1:] if "*" in at.tensor else _whole(shape, at)
            tensors |= dict.fromkeys(stored, Wanted(whole))
            continue
        *outputs, width = _whole(shape, at._replace(transposed=False))
        scales = (*outputs, width // BLOCK)
        tensors[stored[0] + BLOCKS] = Wanted((*scales, BLOCK // 2), ("U8",))
        tensors[stored[0] + SCALES] = Wanted(scales, ("U8",))
    return tensors


def views(config: DecoderConfig, found: Mapping[str, Stored]) -> dict[str, Stored | View]:
    """The tensors of a model, of those of a checkpoint, which are as `wanted`."""
    seen: dict[str, Stored | View] = dict(found)
    for name, at, stored in _stored(config):
        packed = _is_packed(stored[0], found)
        names = [stored[0] + end for end in (BLOCKS, SCALES)] if packed else stored
        parts = [found[tensor] for tensor in names]
        for tensor in names:
            seen.pop(tensor, None)
        first = parts[0]
        if packed:
            decode = functools.partial(_decode, name, parts, at._replace(transposed=False))
            shape = (first.shape[0], first.shape[1] // at.step, BLOCK * first.shape[2])
            read = functools.partial(_dequantized, decode)
            seen[name] = View(first.shard, shape, "F32", read, decode)
        else:
            shape = (len(parts), *first.shape) if "*" in at.tensor else _part(first.shape, at)
            read = functools.partial(_read, parts, at)
            seen[name] = View(first.shard, shape, first.dtype, read)
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


def stored_name(config: DecoderConfig, tensor: str) -> str:
    """The tensor of a checkpoint that a tensor of a model is in."""
    return next((stored[0] for name, _, stored in _stored(config) if name == tensor), tensor)


def unpacked(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json without the packing of a gpt-oss, which the names of its tensors say."""
    packing = fields.get("quantization_config")
    known = isinstance(packing, dict) and packing.get("quant_method") == METHOD
    if known and fields.get("architectures") == ["GptOssForCausalLM"]:
        return {name: value for name, value in fields.items() if name != "quantization_config"}
    return fields


def moved_online(fields: Mapping[str, Any]) -> frozenset[str]:
    """The stored weights whose inputs a Hadamard matrix moves, in blocks, by a transform_config.

    Raises:
      ValueError: It says something else.
    """
    packing = fields.get("quantization_config") or {}
    groups = packing.get("transform_config", {}).get("config_groups", {})
    if groups and groups.keys() != {"hadamard"}:
        raise ValueError(f"config.json: transform_config has {', '.join(groups)}: give hadamard")
    return frozenset(n for g in groups.values() for apply in g["apply"] for n in apply["targets"])


def _stored(config: DecoderConfig) -> Iterator[tuple[str, In, list[str]]]:
    """Name of each tensor that is stored otherwise, where it is, and the names there."""
    experts = FAMILIES[config.architecture].experts
    for number in range(config.num_hidden_layers):
        prefix = layer_prefix(number)
        for name, at in ({} if experts is None else experts.stored).items():
            each = range(config.num_experts if "*" in at.tensor else 1)
            yield prefix + name, at, [prefix + at.tensor.replace("*", str(e)) for e in each]


def _is_packed(tensor: str, found: Mapping[str, Stored]) -> bool:
    return tensor not in found and tensor + BLOCKS in found


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


def _decode(name: str, parts: list[Stored], at: In) -> MXArray:
    """The numbers of blocks and scales."""
    blocks, scales = (np.ascontiguousarray(_rows(part.read(), at)) for part in parts)
    about = {
        "element": "e2m1",
        "block_size": BLOCK,
        "shape": (*scales.shape[:-1], BLOCK * scales.shape[-1]),
        "scales": "float8_e8m0fnu",
    }
    return from_tensors(name, about, {f"{name}.codes": blocks.ravel(), f"{name}.scales": scales})


def _dequantized(decode: Callable[[], MXArray]) -> np.ndarray:
    return np.asarray(decode().dequantize())
