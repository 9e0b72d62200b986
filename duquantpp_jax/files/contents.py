"""What is in files and arrays: hashes, and numbers that are none."""

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PIECE = 1 << 17
"""Numbers that `all_finite` looks at at once."""


def check_finite(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError if a tensor of a file has NaN or Inf; names it and counts them."""
    for name, array in tensors.items():
        if np.issubdtype(array.dtype, np.integer) or array.dtype == bool:
            continue
        if not all_finite(array):
            wrong = np.count_nonzero(~np.isfinite(array))
            raise ValueError(
                f"{path}: {name} has NaN or Inf in {wrong} of {array.size} numbers: all of them "
                "must be finite"
            )


def all_finite(array: np.ndarray) -> bool:
    """Whether an array of floats has neither NaN nor Inf.

    The largest magnitude says it: NaN wins every maximum. Bits, as integers are fast, and in pieces
    that stay in the processor's cache.

    >>> all_finite(np.float32([1, -2])), all_finite(np.float32([1, -np.inf]))
    (True, False)
    """
    unsigned = np.dtype(f"uint{8 * array.itemsize}")
    bits, magnitude = np.ravel(array).view(unsigned), np.iinfo(unsigned).max >> 1
    pieces = (bits[first : first + PIECE] for first in range(0, bits.size, PIECE))
    largest = max(((piece & magnitude).max() for piece in pieces), default=unsigned.type(0))
    return bool(np.isfinite(largest.view(array.dtype)))


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; computed again only if the file was written again."""
    found = path.stat()
    written = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return _sha256(path, *written)


def sha256_of_each(paths: Sequence[Path]) -> list[str]:
    """`sha256` of several files, side by side: each is bound by a core, and not by the disk."""
    if len(paths) < 2:
        return [sha256(path) for path in paths]
    with ThreadPoolExecutor(min(len(paths), os.cpu_count() or 1, 16)) as threads:
        return [*threads.map(sha256, paths)]


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, *written: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
