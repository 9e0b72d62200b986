"""Files that are written whole or not at all: under a temporary name that is then changed."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open


def cache_directory() -> Path:
    """Where what can be made again is kept: $DUQUANTPP_CACHE, else ~/.cache/duquantpp_jax."""
    return Path(os.environ.get("DUQUANTPP_CACHE") or os.path.expanduser("~/.cache/duquantpp_jax"))


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to; at the end it is renamed to `path`."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink()
        raise


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory to write to, renamed to `path` at the end.

    Raises:
      ValueError: `path` exists and is not an empty directory.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} already exists: give the name of a new directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's 0700 would hide it from others
        yield partial
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file with `whole`, and makes its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_bytes(content)


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes arrays as a safetensors file with `write_whole`."""
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    write_whole(path, safetensors.numpy.save(arrays, dict(metadata)))


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata; raises ValueError if it is none."""
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None


def to_json(value: Any, *, indent: int | None = 1) -> bytes:
    """JSON text that is the same for the same value; `indent` None gives a single line.

    Raises:
      ValueError: A number is NaN or Inf.
    """
    return (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(directory: Path) -> None:
    """Checks that files can be written to a directory that need not exist yet.

    Opens a file without a name in it, or in its nearest existing parent: a kill leaves nothing.

    Raises:
      ValueError: They cannot be written.
    """
    place = next(path for path in (directory, *directory.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        said = f"cannot write to {directory} ({error.strerror}): give another --out"
        raise ValueError(said) from None


def module_hashes(*modules: str) -> dict[str, str]:
    """SHA-256 of the files of those imported modules that are not of this package, by name."""
    found = {}
    for name in modules:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and name.partition(".")[0] != __name__.partition(".")[0]:
            found[name] = sha256(Path(file))
    return found
