"""GGUF files: a header checked before anything is allocated, and tensors read one at a time.

    "GGUF", version, number of tensors, number of keys          4 + 4 + 8 + 8 bytes, little-endian
    keys       name, kind, value; a string is its length (8 bytes) and UTF-8; an array is the kind
               of its values, their number and the values
    tensors    name, number of dimensions, dimensions (fastest first), block type, offset
    data       each tensor at its offset from the next multiple of general.alignment

Every number is held against the bytes that are left before it is believed. Block types are decoded
by the library `gguf` (extra `gguf`); its reader is not used, because it believes the numbers: a
file of 49 bytes that claims an array of 2^60 values fills the memory.

Source: docs/gguf.md of ggml, version 3 (version 2 differs only in what it calls itself).
"""

import math
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float

_NUMBERS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4"},
    **{7: "?", 10: "<u8", 11: "<i8", 12: "<f8"},
}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError("a GGUF file needs gguf: pip install 'duquantpp_jax[gguf]'") from None
    return gguf


class Blocks(NamedTuple):
    """A tensor of a GGUF file: its bytes there, and what they mean.

    Attributes:
      kind: Block type, by ggml's name; floats are read as they are, others in float32.
      heads: Of rows in llama.cpp's rotary order; None where rows are in order.
      less: What `read` subtracts.
    """

    shard: Path
    shape: tuple[int, ...]
    kind: str
    offset: int
    size: int
    heads: int | None = None
    less: float = 0.0

    @property
    def dtype(self) -> str:
        """Of the array that `read` gives."""
        return self.kind if self.kind in _FLOATS else "F32"

    def read(self) -> Float[np.ndarray, "..."]:
        """The array, decoded; rows of rotary pairs as Hugging Face orders them.

        llama.cpp turns neighbours (2i, 2i + 1) of a head, Hugging Face (i, i + d/2).
        """
        array = np.array(np.memmap(self.shard, np.uint8, "r", self.offset, (self.size,)))
        if self.kind in _FLOATS:
            array = array.view(_FLOATS[self.kind])
        else:
            library, rows = _library(), array.reshape(math.prod(self.shape[:-1]), -1)
            try:
                with np.errstate(all="ignore"):  # a scale of Inf is found where weights are checked
                    array = library.dequantize(rows, library.GGMLQuantizationType[self.kind])
            except NotImplementedError:
                raise ValueError(
                    f"{self.shard} has tensors of block type {self.kind}, which gguf does not "
                    "decode: give a file in another type"
                ) from None
        if self.less:
            array = array - array.dtype.type(self.less)
        if self.heads is not None:
            array = array.reshape(self.heads, -1, 2, *self.shape[1:]).swapaxes(1, 2)
        return np.ascontiguousarray(array).reshape(self.shape)


def read_contents(path: Path) -> tuple[dict[str, Any], dict[str, Blocks]]:
    """The keys of a GGUF file with their values, and its tensors by llama.cpp's names.

    Raises:
      ValueError: It is none, is truncated, or contradicts itself.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: give one, or a Hugging Face model directory")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(path, data).contents()


class _Header:
    """Reads on from byte `at`, and never beyond the end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 4

    def wrong(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is a broken GGUF file ({what}): fetch it again")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.wrong(f"{count} bytes at {self.at} are beyond its {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, size: int = 8) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        try:
            return self.take(self.number()).decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"the string before {self.at} is not UTF-8") from None

    def value(self) -> Any:
        if (kind := self.number(4)) == _ARRAY:
            return self.values(self.number(4), self.number())
        (found,) = self.values(kind, 1)
        return float(str(np.float32(found))) if kind == _FLOAT32 else found  # shortest decimal

    def values(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return [self.string() for _ in range(count)]  # ends with the file at the latest
        if kind not in _NUMBERS:
            raise self.wrong(f"values of the unknown kind {kind} before {self.at}")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def contents(self) -> tuple[dict[str, Any], dict[str, Blocks]]:
        version, count, keys = self.number(4), self.number(), self.number()
        if version not in (2, 3):
            raise self.wrong(f"version {version} instead of 2 or 3, little-endian")
        found = self.named(keys, self.value)
        tensors = self.named(count, self.tensor)
        step = found.get("general.alignment", 32)
        if type(step) is not int or step < 1 or step & (step - 1):
            raise self.wrong(f"general.alignment {step!r:.60} is no power of two")
        start = -(-self.at // step) * step
        for name, blocks in tensors.items():
            tensors[name] = blocks._replace(offset=start + blocks.offset)
            if (beyond := start + blocks.offset + blocks.size - len(self.data)) > 0:
                raise self.wrong(f"tensor {name!r:.60} ends {beyond} bytes beyond it")
        return found, tensors

    def named(self, count: int, read: Callable[[], Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            if (name := self.string()) in found:
                raise self.wrong(f"two of the name {name!r:.60}")
            found[name] = read()
        return found

    def tensor(self) -> Blocks:
        library, dimensions = _library(), self.number(4)
        if not 1 <= dimensions <= 4:
            raise self.wrong(f"a tensor of {dimensions} dimensions before {self.at}")
        shape = tuple(self.number() for _ in range(dimensions))[::-1]
        try:
            kind = library.GGMLQuantizationType(self.number(4))
        except ValueError as error:
            raise self.wrong(f"before {self.at}: {error}") from None
        elements, size = library.GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % elements:
            raise self.wrong(f"shape {shape} before {self.at} is not in blocks of {elements}")
        size *= math.prod(shape) // elements
        return Blocks(self.path, shape, kind.name, self.number(), size)
