"""The safetensors files of a Hugging Face directory, read header first.

A safetensors file is 8 bytes of length, that much JSON naming each tensor's dtype, shape and
place, then the data. So names and shapes of a whole model are checked before an array is allocated.

Source: the safetensors format description; the directory layout of transformers'
`save_pretrained` and of the hub's cache.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from safetensors import SafetensorError, safe_open

from duquantpp_jax.checkpoints.gguf import Blocks
from duquantpp_jax.files import all_finite, one_line, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OWN_INDEX = "quantized.safetensors.index.json"
"""Of what `duquantpp quantize` writes: a name that no other program looks for."""

BYTES = ("F8_E8M0", "F8_E4M3")
"""Types that the library does not give to NumPy."""


class Tensor(NamedTuple):
    """Where one tensor of a safetensors file lies and what the header says."""

    shard: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Shaped[np.ndarray, "..."]:
        """Maps the file, parses its header, and reads this tensor alone; scales as their bytes."""
        with _opened(self.shard) as file:
            if self.dtype not in BYTES:
                return file.get_tensor(self.name)
        with self.shard.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            begin, end = json.loads(file.read(size))[self.name]["data_offsets"]
            file.seek(8 + size + begin)
            return np.frombuffer(file.read(end - begin), np.uint8).reshape(self.shape)


Stored = Tensor | Blocks
"""Both have a shard, a shape, a dtype, and `read`, which gives the array in that dtype."""


def shard_files(directory: Path) -> dict[Path, set[str] | None]:
    """The files that hold the tensors, each with the names that the index expects there.

    A file model.safetensors is the whole model, index or not, as in transformers.

    Raises:
      ValueError: there are none, a file is missing, or the index is broken or leads outside.
    """
    if (directory / SINGLE).is_file():
        return {directory / SINGLE: None}
    index = directory / (OWN_INDEX if (directory / OWN_INDEX).is_file() else INDEX)
    if not index.is_file():
        raise ValueError(
            f"{directory} has no {SINGLE} and no {INDEX}: it is incomplete, or its weights "
            "are to be converted to safetensors"
        )
    names = read_json(index).get("weight_map")
    if not (isinstance(names, dict) and names and all(isinstance(f, str) for f in names.values())):
        raise ValueError(f"{index} has no weight_map: it must map each tensor to its shard")
    expected: dict[str, set[str]] = {}
    for name, file in names.items():
        expected.setdefault(file, set()).add(name)
    return {_inside(index, file): expected[file] for file in sorted(expected)}


def _inside(index: Path, file: str) -> Path:
    """The shard that an index names, which must lie in the model's own directory."""
    directory = index.parent
    path, roots = directory / file, [directory.resolve()]
    # The hub's cache keeps a snapshot's files as links into the blobs beside all snapshots.
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parent.parent / "blobs")
    plain = file not in ("", ".", "..") and file.isprintable() and not set(file) & set("/\\")
    if not plain or not any(path.resolve().is_relative_to(root) for root in roots):
        raise ValueError(
            f"{index} names the file {file!r:.100}, which is outside the directory: "
            "shards must lie beside the index"
        )
    if not os.path.isfile(path):  # False, too, for names that no file can have
        found = "is no file" if os.path.isdir(path) else "is missing"
        raise ValueError(
            f"{directory}: shard {file!r:.100} {found}: {index.name} names it; fetch it again"
        )
    return path


def inventory(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory, from the headers alone.

    Raises:
      ValueError: As `shard_files`; or a shard is truncated, or differs from the index.
    """
    found: dict[str, Tensor] = {}
    for shard, expected in shard_files(directory).items():
        with _opened(shard) as file:
            names = set(file.keys())
            if expected is not None and names != expected:
                name = min(names ^ expected)
                has, lacks = (shard.name, INDEX) if name in names else (INDEX, shard.name)
                raise ValueError(
                    f"{directory}: tensor {name!r} is in {has} but not in {lacks}: "
                    "index and shards must come from one save"
                )
            for name in sorted(names):
                header = file.get_slice(name)
                found[name] = Tensor(shard, name, tuple(header.get_shape()), header.get_dtype())
    return found


def _opened(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{shard} is truncated or no safetensors file ({one_line(error)}): fetch it again"
        ) from None


def read_stored(
    found: Mapping[str, Any], names: Iterable[str]
) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    """The named tensors as they are stored, shard by shard; raises ValueError for NaN and Inf."""
    for name in sorted(names, key=lambda name: (found[name].shard, name)):
        shard, array = found[name].shard, found[name].read()
        if not all_finite(array):
            kind = "NaN" if np.isnan(array).any() else "Inf"
            wrong = np.count_nonzero(~np.isfinite(array))
            raise ValueError(
                f"tensor {name} in {shard} has {kind} in {wrong} of {array.size} numbers: all "
                "weights must be finite"
            )
        yield name, array
