"""Claims: which process works on what, without locks. No claim outlives its process.

A claim on NAME is a file NAME.0 that names its holder. The file is a hard link to a finished file,
so it appears whole, and only if there was none. The file of a dead holder stays: whoever creates
NAME.1 holds the claim instead, then NAME.2, and so on. Of several processes that find a holder
dead, one succeeds, and none takes a live claim. A holder on this machine is dead if its process is
gone or started at another time; a holder on another machine is dead if it has not renewed its file
for fifteen minutes.

A holder checks that the work is not done before it begins, and records the work before it releases
the claim. So work is done once.
"""

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from duquantpp_jax import files
from duquantpp_jax.files.processes import host, process

RENEWAL_SECONDS = 60
STALE_SECONDS = 15 * 60
"""Age at which a claim of another machine that was not renewed counts as dead."""
UNREADABLE = (AttributeError, KeyError, OSError, OverflowError, RecursionError)
UNREADABLE += (TypeError, ValueError)
"""What a claim that a crash has cut short makes its reader raise."""


@contextlib.contextmanager
def claim(directory: Path, name: str) -> Iterator[bool]:
    """Claims `name` until the end of the block; yields False if a live process holds the claim.

    The file system of the directory must have hard links.
    """
    if (path := _acquire(directory, name)) is None:
        yield False
        return
    done = threading.Event()
    renewal = threading.Thread(target=_renew, args=(path, done), daemon=True)
    renewal.start()
    try:
        yield True
    finally:
        done.set()
        renewal.join()
        forget(directory, {name})


def forget(directory: Path, names: set[str]) -> None:
    """Removes the claims on `names`, also those of processes that were killed."""
    for path in directory.glob("*.*"):
        if path.name.partition(".")[0] in names:
            path.unlink(missing_ok=True)


def left_by(directory: Path, holder: Mapping[str, str | int]) -> set[str]:
    """What a dead process had claimed.

    Args:
      holder: What is known of it, as `processes.process` names it.
    """
    found = set()
    for path in directory.glob("*.*"):
        with contextlib.suppress(*UNREADABLE):
            if json.loads(path.read_bytes()).items() >= holder.items():
                found.add(path.name.partition(".")[0])
    return found


def _acquire(directory: Path, name: str) -> Path | None:
    for generation in itertools.count():
        path = directory / f"{name}.{generation}"
        if _create(path):
            return path
        if _is_live(path):
            return None


def _create(path: Path) -> bool:
    with files.temporary(path.parent / "claim") as whole:
        whole.write_bytes(files.to_json(process()))
        files.sync(whole)
        try:
            os.link(whole, path)
        except FileExistsError:
            return False
        files.sync(path.parent)
    return True


def _is_live(path: Path) -> bool:
    """Whether the holder lives; True for a claim that has just been released.

    A claim that cannot be read is one that a crash of the machine has cut short.
    """
    try:
        holder, renewed = json.loads(path.read_bytes()), path.stat().st_mtime
        if holder["host"] != host():
            return time.time() - renewed < STALE_SECONDS
        return process(holder["pid"]) == holder
    except FileNotFoundError:
        return True
    except UNREADABLE:
        return False


def _renew(path: Path, done: threading.Event) -> None:
    while not done.wait(RENEWAL_SECONDS):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
