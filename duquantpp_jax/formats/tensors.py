"""MXArrays as named NumPy arrays, in which a safetensors file keeps them.

An array `name` becomes the tensors

    name.codes          uint8: two codes of four bits a byte (lower index low), four codes of six
                        bits in three bytes (lowest bits first), or a code of eight bits a byte
    name.scales         uint8 bytes; float32 for formats whose scale has no byte
    name.tensor_scale   float32, for formats that have it

and a record for the metadata of the file: its element (the name, or all fields of an element that
is not from this package), block size, shape and type of scales. Codes are packed along the
flattened array; zeros fill the last byte.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from duquantpp_jax.core import Element, MXArray
from duquantpp_jax.formats.elements import E2M1, E2M3, E3M2, E4M3, E5M2

ELEMENTS = {element.name: element for element in (E2M1, E2M3, E3M2, E4M3, E5M2)}
SCALE_TYPES = {"float8_e8m0fnu": np.uint8, "float8_e4m3fn": np.uint8, "float32": np.float32}


def pack_codes(codes: UInt8[np.ndarray, "*shape"], bits: int) -> UInt8[np.ndarray, " bytes"]:
    """Codes of `bits` bits each as bytes, lowest bits first; zeros fill the last byte."""
    flat = codes.reshape(-1)
    if bits == 8:
        return flat
    if bits == 4 and flat.size % 2 == 0:  # as below, without an array of bits
        return flat[0::2] | flat[1::2] << 4
    each = np.unpackbits(codes.reshape(-1, 1), axis=1, bitorder="little", count=bits)
    return np.packbits(each.ravel(), bitorder="little")


def _packed(codes: UInt8[Array, "*shape"], bits: int) -> UInt8[np.ndarray, " bytes"]:
    """`pack_codes`; pairs of four bits where the codes are, so that half as much is moved."""
    if bits == 4 and codes.size % 2 == 0 and codes.size:
        return np.asarray(_pairs(jnp.asarray(codes)))
    return pack_codes(np.asarray(codes), bits)


@jax.jit
def _pairs(codes: UInt8[Array, "*shape"]) -> UInt8[Array, " bytes"]:
    low, high = jnp.moveaxis(codes.reshape(-1, 2), -1, 0)
    return low | high << 4


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
    """The tensors of an array, and its record for the metadata."""
    scales = array.scales
    tensors = {
        f"{name}.codes": _packed(array.codes(), array.element.bits),
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


def from_tensors(name: str, about: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> MXArray:
    """The array of which `to_tensors` made these tensors and this record.

    Raises:
      ValueError: A tensor is missing or does not fit the record.
    """
    shape, block_size = tuple(about["shape"]), about["block_size"]
    own = about["element"]
    known = isinstance(own, str)
    element = ELEMENTS[own] if known else Element(**own | {"dtype": jnp.dtype(own["dtype"])})
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
    codes = jnp.asarray(unpack_codes(packed, element.bits, shape))
    tensor_scale = tensors.get(f"{name}.tensor_scale")
    tensor_scale = None if tensor_scale is None else jnp.asarray(tensor_scale)
    return MXArray(codes, stored, tensor_scale, element=element, block_size=block_size).stored()
