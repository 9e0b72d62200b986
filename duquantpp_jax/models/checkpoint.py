"""Hugging Face directories, in and out: config.json, safetensors with or without an index.

Every check runs on the headers before an array is allocated: a tensor's name decides the parameter
and its layer (`model.layers.3.mlp.up_proj.weight` is row 3 of `model.layers.*.mlp.up_proj`), and
its shape and dtype must be the parameter's. Whatever is wrong raises ValueError with one line that
says what was wrong and what would be right. Nothing is unpickled, evaluated or fetched.

Source: the safetensors format (header of 8 bytes length + JSON, then the data) and the directory
layout that transformers' `save_pretrained` writes.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize
from tokenizers import Tokenizer

from duquantpp_jax.models.config import DecoderConfig
from duquantpp_jax.models.decoder import Decoder, parameter_shapes

_SINGLE, _INDEX, _TOKENIZER = "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
_DTYPES = ("BF16", "F16", "F32")
# Rotary frequencies are derived from rope_theta; old checkpoints store them all the same.
_HARMLESS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class _Tensor(NamedTuple):
    """Where one tensor of the checkpoint lies and what its header says."""

    shard: Path
    shape: tuple[int, ...]
    dtype: str


class _Place(NamedTuple):
    """The parameter that a tensor fills, at which index (its layer or all of it), in what shape."""

    key: str
    index: Any
    shape: tuple[int, ...]


def load_config(directory: str | os.PathLike[str]) -> DecoderConfig:
    """The configuration in `directory`/config.json.

    Raises:
      ValueError: there is none, it is no JSON object, or it is not supported.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory: give a Hugging Face model directory")
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"{directory} has no config.json: give a Hugging Face model directory, "
            "which has config.json, *.safetensors and tokenizer.json"
        )
    try:
        return DecoderConfig.from_dict(_read_json(directory / "config.json"))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def load(directory: str | os.PathLike[str]) -> Decoder:
    """The float decoder in a Hugging Face directory, its parameters in float32.

    Args:
      directory: Holds config.json and model.safetensors, or shards with
        model.safetensors.index.json.

    Returns:
      The decoder; bfloat16 and float16 tensors are widened, which is exact.

    Raises:
      ValueError: one line naming the file or tensor, what was wrong and what would be right.
    """
    directory = Path(directory)
    config = load_config(directory)
    found = _inventory(directory, _shards(directory))
    shapes = parameter_shapes(config)
    if config.tie_word_embeddings and "lm_head.weight" in found:
        shapes["lm_head"] = shapes["model.embed_tokens"]  # some writers store the tied head too
    places = _places(config, shapes)
    for name, place in places.items():
        if name not in found:
            raise ValueError(
                f"{directory}: tensor {name} is missing: the model that config.json describes "
                f"has one of shape {_dims(place.shape)}"
            )
    for name, tensor in found.items():
        _check_header(name, tensor, places, config)
    arrays = {key: np.empty(shape, np.float32) for key, shape in shapes.items()}
    for name, array in _tensors(found, list(places)):
        arrays[places[name].key][places[name].index] = array
    if config.tie_word_embeddings:
        head = arrays.pop("lm_head", arrays["model.embed_tokens"])
        if not np.array_equal(head, arrays["model.embed_tokens"]):
            raise ValueError(
                f"{directory}: lm_head.weight differs from model.embed_tokens.weight, but "
                "config.json says tie_word_embeddings: it must be false, or the two equal"
            )
    return Decoder(config, {key: jnp.asarray(array) for key, array in arrays.items()})


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in `directory`/tokenizer.json.

    Raises:
      ValueError: there is none, it cannot be read, or it has ids that the model has not.
    """
    path = Path(directory) / _TOKENIZER
    config = load_config(directory)
    if not path.is_file():
        raise ValueError(f"{directory} has no tokenizer.json: add the model's own")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"{path} is not a tokenizer ({_one_line(error)}): "
            "it must be the JSON that the tokenizers library writes"
        ) from None
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last >= config.vocab_size:
        raise ValueError(
            f"{path} has token {last}, but config.json says vocab_size {config.vocab_size}: "
            "both must come from one model"
        )
    return tokenizer


def sha256(directory: str | os.PathLike[str]) -> str:
    """Which model this is: SHA-256 over the names and bytes of config.json and its shards.

    Raises:
      ValueError: as `load`, where the files themselves are missing or misnamed.
    """
    directory = Path(directory)
    load_config(directory)
    total = hashlib.sha256()
    files = {"config.json": directory / "config.json"}
    files |= {shard.name: shard for shard in _shards(directory)}
    for name, path in sorted(files.items()):
        with path.open("rb") as file:
            total.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def save(model: Decoder, tokenizer_json: str, directory: str | os.PathLike[str]) -> None:
    """Writes a Hugging Face Llama directory, its tensors rounded to bfloat16 (nearest, even).

    The files are written beside the place and renamed into it: killed at any moment, `directory`
    is whole or absent.

    Raises:
      ValueError: `directory` exists and is not an empty directory.
    """
    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ValueError(f"{directory} already exists: give the name of a new directory")
    arrays = {name: np.asarray(array) for name, array in model.parameters().items()}
    tensors = {
        name: np.ascontiguousarray(arrays[place.key][place.index].astype(ml_dtypes.bfloat16))
        for name, place in _places(model.config, parameter_shapes(model.config)).items()
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's 0700 would hide the model from others
        config = json.dumps(model.config.to_dict(), indent=1)
        (partial / "config.json").write_text(config + "\n", encoding="utf-8")
        (partial / _TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
        (partial / _SINGLE).write_bytes(serialize(tensors, metadata={"format": "pt"}))
        partial.replace(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path.name} is not JSON ({_one_line(error)}): restore the file"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is a {type(content).__name__}: it must be a JSON object")
    return content


def _shards(directory: Path) -> dict[Path, set[str] | None]:
    """The files that hold the tensors, each with the names the index expects there."""
    index = directory / _INDEX
    if not index.is_file():
        if (directory / _SINGLE).is_file():
            return {directory / _SINGLE: None}
        raise ValueError(
            f"{directory} has no {_SINGLE} and no {_INDEX}: convert the weights to safetensors"
        )
    try:
        names = _read_json(index).get("weight_map")
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    if not (isinstance(names, dict) and names and all(isinstance(f, str) for f in names.values())):
        raise ValueError(f"{index} has no weight_map: it must map each tensor to its shard")
    shards: dict[Path, set[str] | None] = {}
    for file in sorted(set(names.values())):
        shards[_inside(directory, file)] = {name for name, where in names.items() if where == file}
    return shards


def _inside(directory: Path, file: str) -> Path:
    """The shard that an index names, which must lie in the model's own directory."""
    path, roots = directory / file, [directory.resolve()]
    # The hub's cache keeps a snapshot's files as links into the blobs beside all snapshots.
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parent.parent / "blobs")
    plain = file not in ("", ".", "..") and not set(file) & set("/\\\0")
    if not plain or not any(path.resolve().is_relative_to(root) for root in roots):
        raise ValueError(
            f"{directory / _INDEX} names the file {file!r}, which is outside the directory: "
            "shards must lie beside the index"
        )
    if not path.is_file():
        raise ValueError(f"{directory}: shard {file} is missing: {_INDEX} names it; fetch it again")
    return path


def _inventory(directory: Path, shards: dict[Path, set[str] | None]) -> dict[str, _Tensor]:
    """Every tensor of every shard, from the headers alone."""
    found: dict[str, _Tensor] = {}
    for shard, expected in shards.items():
        with _opened(shard) as file:
            names = set(file.keys())
            if expected is not None and names != expected:
                name = min(names ^ expected)
                has, lacks = (shard.name, _INDEX) if name in names else (_INDEX, shard.name)
                raise ValueError(
                    f"{directory}: tensor {name} is in {has} but not in {lacks}: "
                    "index and shards must come from one save"
                )
            for name in sorted(names):
                header = file.get_slice(name)
                found[name] = _Tensor(shard, tuple(header.get_shape()), header.get_dtype())
    return found


def _opened(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{shard} is truncated or no safetensors file ({_one_line(error)}): fetch it again"
        ) from None


def _places(config: DecoderConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, _Place]:
    """The table from checkpoint names to parameters."""
    places = {}
    for key, shape in shapes.items():
        if "*" not in key:
            places[f"{key}.weight"] = _Place(key, ..., shape)
            continue
        for layer in range(config.num_hidden_layers):
            places[f"{key.replace('*', str(layer))}.weight"] = _Place(key, layer, shape[1:])
    return places


def _check_header(
    name: str, tensor: _Tensor, places: dict[str, _Place], config: DecoderConfig
) -> None:
    if _HARMLESS.fullmatch(name):
        return
    if name not in places:
        raise ValueError(
            f"tensor {name} has no place in a {config.architecture} of "
            f"{config.num_hidden_layers} layers: config.json must belong to these weights"
        )
    if tensor.shape != places[name].shape:
        raise ValueError(
            f"tensor {name} has shape {_dims(tensor.shape)}: "
            f"config.json asks for {_dims(places[name].shape)}"
        )
    if tensor.dtype not in _DTYPES:
        raise ValueError(
            f"tensor {name} has dtype {tensor.dtype}: it must be one of {', '.join(_DTYPES)}"
        )


def _tensors(found: dict[str, _Tensor], names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The named tensors in float32, shard by shard, each checked to be finite."""
    for shard in sorted({found[name].shard for name in names}):
        with _opened(shard) as file:
            for name in (one for one in names if found[one].shard == shard):
                array = file.get_tensor(name).astype(np.float32)
                if not np.isfinite(array).all():
                    kind = "NaN" if np.isnan(array).any() else "Inf"
                    raise ValueError(
                        f"tensor {name} in {shard} has {kind}: all weights must be finite"
                    )
                yield name, array


def _dims(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
