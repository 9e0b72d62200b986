"""MXArrays in safetensors files: packed codes, scale bytes, and what it takes to read them.

An array `name` becomes the tensors

    name.codes          uint8: two codes of four bits a byte (lower index low), four codes of six
                        bits in three bytes (lowest bits first), or one code of eight bits a byte
    name.scales         uint8 bytes, or float32 for formats whose scale has no byte
    name.tensor_scale   float32, where there is one

and the file's metadata holds, as JSON under the key `name`, the element (its name, or all of it if
it is not one of this package), the block size, the shape and the type of the scales. Packing runs
along the flattened array, with zeros in what is left of the last byte; the shape in the metadata
says how many codes count.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from safetensors import safe_open
from safetensors.numpy import save_file

from duquantpp_jax import files
from duquantpp_jax.core import Element, MXArray
from duquantpp_jax.formats.elements import E2M1, E2M3, E3M2, E4M3, E5M2

FORMAT = "duquantpp_jax mx 1"
ELEMENTS = {element.name: element for element in (E2M1, E2M3, E3M2, E4M3, E5M2)}
SCALE_TYPES = {"float8_e8m0fnu": np.uint8, "float8_e4m3fn": np.uint8, "float32": np.float32}


def pack_codes(codes: UInt8[np.ndarray, "*shape"], bits: int) -> UInt8[np.ndarray, " bytes"]:
    """Codes of so many bits one after the other, lowest bits first, zeros at the end."""
    flat = codes.reshape(-1)
    if bits == 8:
        return flat
    if bits == 4 and flat.size % 2 == 0:  # the general way, without an array of bits
        return flat[0::2] | flat[1::2] << 4
    each = np.unpackbits(codes.reshape(-1, 1), axis=1, bitorder="little", count=bits)
    return np.packbits(each.ravel(), bitorder="little")


def unpack_codes(
    packed: UInt8[np.ndarray, " bytes"], bits: int, shape: tuple[int, ...]
) -> UInt8[np.ndarray, "*shape"]:
    """The codes that `pack_codes` packed."""
    count = int(np.prod(shape, dtype=np.int64))
    if bits == 8:
        return packed.reshape(shape)
    if bits == 4 and count % 2 == 0:
        return np.stack([packed & 15, packed >> 4], axis=-1).reshape(shape)
    each = np.unpackbits(packed, bitorder="little", count=count * bits).reshape(-1, bits)
    return np.packbits(each, axis=1, bitorder="little").reshape(shape)


def to_tensors(name: str, array: MXArray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of an array, and what the metadata says of it."""
    scales = array.scales
    tensors = {
        f"{name}.codes": pack_codes(np.asarray(array.codes()), array.element.bits),
        f"{name}.scales": np.asarray(array.scale_bytes() if scales.dtype.itemsize == 1 else scales),
    }
    if array.tensor_scale is not None:
        tensors[f"{name}.tensor_scale"] = np.asarray(array.tensor_scale)
    element = array.element
    own = dataclasses.asdict(element) | {"dtype": str(jnp.dtype(element.dtype))}
    about = {
        "element": element.name if element in ELEMENTS.values() else own,
        "block_size": array.block_size,
        "shape": array.shape,
        "scales": str(scales.dtype),
    }
    return tensors, about


def save(path: str | os.PathLike[str], arrays: Mapping[str, MXArray]) -> None:
    """Writes arrays to one file, whole or not at all.

    Args:
      path: The file.
      arrays: By name.
    """
    path = pathlib.Path(path)
    tensors, metadata = {}, {"format": FORMAT}
    for name, array in arrays.items():
        if name == "format":
            raise ValueError('an array cannot be named "format": the file says its own there')
        own, about = to_tensors(name, array)
        tensors |= own
        metadata[name] = json.dumps(about)
    with files.whole(path) as temporary:
        save_file(tensors, temporary, metadata)


def load(path: str | os.PathLike[str]) -> dict[str, MXArray]:
    """Reads the arrays that `save` wrote.

    Raises:
      ValueError: The file is not one of those, or its parts do not fit together.
    """
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} says format {metadata.get('format')!r} and not {FORMAT!r}: "
                "it was not written by duquantpp_jax.formats.storage.save"
            )
        keys = set(file.keys())
        return {
            name: from_tensors(
                name, json.loads(text), {k: file.get_tensor(k) for k in keys & _keys(name)}
            )
            for name, text in metadata.items()
            if name != "format"
        }


def _keys(name: str) -> set[str]:
    return {f"{name}.{part}" for part in ("codes", "scales", "tensor_scale")}


def from_tensors(name: str, about: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> MXArray:
    """The array that `to_tensors` took apart.

    Raises:
      ValueError: Its parts are missing or do not fit together.
    """
    shape, block_size = tuple(about["shape"]), about["block_size"]
    element = about["element"]
    if isinstance(element, str):
        element = ELEMENTS[element]
    else:
        element = Element(**element | {"dtype": jnp.dtype(element["dtype"])})
    packed, scales = tensors.get(f"{name}.codes"), tensors.get(f"{name}.scales")
    if packed is None or scales is None:
        raise ValueError(f"{name} has no codes or no scales in the file")
    size = -(-int(np.prod(shape, dtype=np.int64)) * element.bits // 8)
    blocks = (*shape[:-1], shape[-1] // block_size)
    kind = about["scales"]
    if packed.shape != (size,) or scales.shape != blocks or scales.dtype != SCALE_TYPES[kind]:
        raise ValueError(
            f"{name} of shape {shape} needs {size} bytes of codes and {blocks} scales of {kind}: "
            f"the file has {packed.shape} and {scales.shape} of {scales.dtype}"
        )
    stored = jnp.asarray(scales)
    if kind != "float32":
        stored = jax.lax.bitcast_convert_type(stored, jnp.dtype(kind))
    tensor_scale = tensors.get(f"{name}.tensor_scale")
    return MXArray(
        jnp.asarray(unpack_codes(packed, element.bits, shape)),
        stored,
        None if tensor_scale is None else jnp.asarray(tensor_scale),
        element=element,
        block_size=block_size,
    ).stored()
