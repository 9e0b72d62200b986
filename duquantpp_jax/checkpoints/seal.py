"""The seal of a quantized directory: SHA256SUMS, a line for each file, written before config.json.

    sha256 of the file  name

as `sha256sum` writes it, so that `sha256sum -c SHA256SUMS` checks a directory without this package.
A file is checked when it is read, and not before: loading a model hashes every file once.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from duquantpp_jax import files

SUMS, SEALED = "SHA256SUMS", "quantization.json"
"""The seal, and the file that marks the directories that have one."""
READ = (".safetensors", ".json", ".jinja", ".model")
"""Endings of the files that programs read; others only people."""
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\\0]+)")


def write_seal(directory: Path, last: Mapping[str, bytes]) -> None:
    """Writes the hashes of all files of a directory.

    Args:
      last: Contents of files that are written after it.
    """
    paths = [path for path in directory.iterdir() if path.is_file() and path.name != SUMS]
    paths = [path for path in paths if not path.name.startswith(".")]
    names = (path.name for path in paths)
    sums = dict(zip(names, files.sha256_of_each(paths), strict=True))
    sums |= {name: hashlib.sha256(content).hexdigest() for name, content in last.items()}
    lines = (f"{sums[name]}  {name}\n" for name in sorted(sums))
    files.write_whole(directory / SUMS, "".join(lines).encode())


def sealed(path: Path) -> Path:
    """The path of a file, which is what SHA256SUMS says where its directory is a quantized one.

    Raises:
      ValueError: The file is another than was written; names the one that it is, if it is one of
        the directory's.
    """
    if not (path.parent / SEALED).is_file():
        return path
    sums = _read(path.parent / SUMS)
    if path.name not in sums:
        raise ValueError(f"{path} is not in {SUMS}: remove it, or quantize again with --overwrite")
    if not path.is_file():
        raise ValueError(f"{path} is missing, and {SUMS} names it: copy it again")
    if (found := files.sha256(path)) != sums[path.name]:
        is_other = next((name for name, known in sums.items() if known == found), None)
        contents = f"holds what {is_other} must hold" if is_other else f"has SHA-256 {found[:16]}"
        raise ValueError(
            f"{path} {contents}, and {SUMS} says {sums[path.name][:16]}: copy the file again, or "
            "quantize again with --overwrite"
        )
    return path


def check_all_there(directory: Path) -> None:
    """Raises ValueError if a file is missing that the seal names; people's texts may be."""
    for name in _read(directory / SUMS):
        path = directory / name
        if path.suffix in READ and not path.is_file():
            raise ValueError(f"{path} is missing, and {SUMS} names it: copy it again")


def check_whole(directory: Path) -> None:
    """Raises ValueError, as `sealed`, if a file that programs read is another than was written."""
    for name in _read(directory / SUMS):
        if Path(name).suffix in READ:
            sealed(directory / name)


def _read(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has no {SUMS}, which newer versions write and by which its files are "
            "checked: run the same duquantpp quantize again, with --overwrite if an older version "
            f"made it; or, if you trust the files, run in it: sha256sum * > {SUMS}"
        )
    with files.refusing(path, "copy it again, or quantize again with --overwrite"):
        lines = [_LINE.fullmatch(line) for line in path.read_text().splitlines()]
        if not all(lines):
            raise ValueError("a line is no SHA-256 and name")
        return {line[2]: line[1] for line in lines if line}
