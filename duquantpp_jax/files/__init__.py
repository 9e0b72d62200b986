"""Files that are written whole or not at all, and are checked when they are read.

A file is written under a temporary name that is then changed. Tensors are written with a hash of
names, types, shapes, numbers and metadata, and whatever a reader raises for a broken file is one
line that names the file (`refusing`).
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from duquantpp_jax.files.contents import all_finite as all_finite
from duquantpp_jax.files.contents import check_finite as check_finite
from duquantpp_jax.files.contents import sha256 as sha256
from duquantpp_jax.files.contents import sha256_of_each as sha256_of_each
from duquantpp_jax.files.processes import host, process, taken

ABOUT = "duquantpp_jax"
"""The entry of a safetensors file's metadata that says what its tensors are, as JSON."""


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A name beside a path that holds the name of this process; at the end it is removed.

    Those that dead processes of this machine have left in the same directory are removed before.
    """
    for other, alive in _temporaries(path.parent):
        if not alive:
            with contextlib.suppress(OSError):  # of another user
                remove(other)
    own = process()
    unique = f"{_here()}-{own['pid']}-{own['start']}-{secrets.token_hex(4)}"
    name = path.parent / f".{path.name}.{unique}"
    try:
        yield name
    finally:
        remove(name)


def _temporaries(directory: Path) -> Iterator[tuple[Path, bool]]:
    """The temporary names of this machine's processes in a directory, and whether they live."""
    pattern = re.compile(rf"\..+\.{_here()}-(\d+)-(\d+)-[0-9a-f]{{8}}")
    for path in directory.iterdir():
        if found := pattern.fullmatch(path.name):
            yield path, process(int(found[1]))["start"] == int(found[2])


def _here() -> str:
    """The host in a name: the first letters of one may be those of many others."""
    return hashlib.sha256(host().encode()).hexdigest()[:12]


def remove(path: Path) -> None:
    """Removes a file or a directory, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file or a directory is on the disk, where the system can say so."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def cache_directory() -> Path:
    """Where what can be made again is kept: $DUQUANTPP_CACHE, else ~/.cache/duquantpp_jax."""
    return Path(os.environ.get("DUQUANTPP_CACHE") or os.path.expanduser("~/.cache/duquantpp_jax"))


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to; at the end it is renamed to `path`."""
    with temporary(path) as name:
        yield name
        _name(name, path)


def _name(written: Path, path: Path) -> None:
    """Gives a whole file its name; both are then on the disk."""
    written.chmod(0o644)
    sync(written)
    os.replace(written, path)
    sync(path.parent)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory to write to, renamed to `path` at the end.

    Raises:
      ValueError: `path` exists and is not an empty directory, or another process writes it.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} already exists: give the name of a new directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    live = (p.name.rpartition(".")[0] for p, alive in _temporaries(path.parent) if alive)
    if f".{path.name}" in live:
        raise ValueError(taken(path))
    with temporary(path) as partial:
        partial.mkdir()
        yield partial
        try:
            partial.replace(path)
        except OSError:
            if path.is_dir() and any(path.iterdir()):
                raise ValueError(taken(path)) from None
            raise
        sync(path.parent)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file with `whole`, and makes its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_bytes(content)


def write_tensors(path: Path, tensors: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Writes arrays as a safetensors file, whole or not at all, with a hash of its contents.

    Args:
      about: What JSON can say of the tensors; `read_tensors` gives it.
    """
    arrays = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    hashed = {**about, "sha256": _hash_of(arrays, about)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, arrays, {ABOUT: to_json(hashed, indent=None).decode()})


def save(path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all; raises OSError if the disk is full."""
    with temporary(path) as place:  # a directory: the library has temporary files of its own
        place.mkdir()
        try:
            save_file({**arrays}, place / path.name, metadata)
        except SafetensorError as error:
            raise OSError(
                f"cannot write {path} ({one_line(error)}): make room and run the same command again"
            ) from None
        _name(place / path.name, path)


def read_tensors(path: Path, remedy: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors that `write_tensors` wrote, and what it was told of them.

    Args:
      remedy: What to do if the file is broken.

    Raises:
      ValueError: The file is no such file, or holds other contents than were written.
    """
    with refusing(path, remedy):
        about = read_about(path, remedy)
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    written = about.pop("sha256", None)
    if written is None:
        raise ValueError(f"{path} has no hash of its contents: it is of an old version; {remedy}")
    if (found := _hash_of(tensors, about)) != written:
        raise ValueError(
            f"{path} holds contents of SHA-256 {found[:16]}, and says {written!r:.18}: {remedy}"
        )
    return tensors, about


def read_about(path: Path, remedy: str) -> dict[str, Any]:
    """What a safetensors file of this package says of its tensors; raises ValueError if nothing."""
    with refusing(path, remedy), safe_open(path, framework="numpy") as file:
        about = json.loads((file.metadata() or {}).get(ABOUT, "null"))
    if not isinstance(about, dict):
        raise ValueError(f"{path} was not written by duquantpp_jax: {remedy}")
    return about


def _hash_of(arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> str:
    total = hashlib.sha256(json.dumps(about, sort_keys=True, allow_nan=False).encode())
    for name, array in arrays.items():
        total.update(f"{name} {array.dtype} {array.shape} ".encode())
        total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return total.hexdigest()


@contextlib.contextmanager
def refusing(path: Path, remedy: str) -> Iterator[None]:
    """Whatever a broken file makes its reader raise becomes a ValueError of one line.

    Args:
      path: The file; an error that names it is left as it is.
      remedy: What to do if it is broken.
    """
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {remedy}") from None
    except (
        *(ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError),
        *(SafetensorError, ValueError),
    ) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        if isinstance(error, KeyError):
            kind = "it lacks "
        raise ValueError(f"{path} cannot be read ({kind}{one_line(error)}): {remedy}") from None


def read_json(path: Path, remedy: str = "restore the file") -> dict[str, Any]:
    """The object in a JSON file; raises ValueError if the file holds none."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({one_line(error)}): {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: {remedy}")
    return content


def check_fields(value: Any, kinds: Any, path: str = "") -> None:
    """Raises ValueError unless a JSON value is of a kind; names the part that is not.

    Args:
      kinds: A type, a union of types, or the kinds of an object's fields by name; other fields may
        stand beside them.
      path: Of the value, for the message.
    """
    if not isinstance(kinds, Mapping):
        if not isinstance(value, kinds):
            raise ValueError(f"has {path or 'a value'} {value!r:.40}, of another kind")
        return
    for name, kind in kinds.items():
        inside = f"{path}.{name}".lstrip(".")
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"has no {inside}")
        check_fields(value[name], kind, inside)


def one_line(error: BaseException) -> str:
    """What an exception says, or its kind, on one line of at most 200 characters."""
    return printable(" ".join(str(error).split()) or type(error).__name__)[:200]


def printable(text: str) -> str:
    """Text whose control characters are written out, so that a terminal does not obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def to_json(value: Any, *, indent: int | None = 1) -> bytes:
    """JSON text that is the same for the same value; `indent` None gives a single line.

    Raises:
      ValueError: A number is NaN or Inf.
    """
    return (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode()


def check_writable(directory: Path, option: str = "--out") -> None:
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
        said = f"cannot write to {directory} ({error.strerror}): give another {option}"
        raise ValueError(said) from None


def check_file(path: Path | None, option: str) -> None:
    """Checks that a file can be written, if one is named.

    Raises:
      ValueError: It cannot be, or is a directory.
    """
    if path is not None:
        if path.is_dir():
            raise ValueError(f"{path} is a directory: give a file as {option}")
        check_writable(path.parent, option)


def module_hashes(*modules: str) -> dict[str, str]:
    """SHA-256 of the files of those imported modules that are not of this package, by name."""
    found = {}
    for name in modules:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and name.partition(".")[0] != __name__.partition(".")[0]:
            found[name] = sha256(Path(file))
    return found
