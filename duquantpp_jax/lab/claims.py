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
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

RENEWAL_SECONDS = 60
STALE_SECONDS = 15 * 60
"""Age at which a claim of another machine that was not renewed counts as dead."""


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


def _acquire(directory: Path, name: str) -> Path | None:
    for generation in itertools.count():
        path = directory / f"{name}.{generation}"
        if _create(path):
            return path
        if _is_live(path):
            return None


def _create(path: Path) -> bool:
    with tempfile.NamedTemporaryFile("w", prefix=".claim.", dir=path.parent) as file:
        json.dump(_holder(os.getpid()), file)
        file.flush()
        try:
            os.link(file.name, path)
        except FileExistsError:
            return False
    return True


def _is_live(path: Path) -> bool:
    """Whether the holder lives; True for a claim that has just been released."""
    try:
        holder, renewed = json.loads(path.read_text()), path.stat().st_mtime
    except FileNotFoundError:
        return True
    if holder["host"] != socket.gethostname():
        return time.time() - renewed < STALE_SECONDS
    return _holder(holder["pid"]) == holder


def _holder(pid: int) -> dict[str, str | int]:
    """Names a process: a later process with the same pid has another start."""
    return {"host": socket.gethostname(), "pid": pid, "start": _start(pid)}


def _start(pid: int) -> int:
    """Start of a process in the system's ticks; -1 if it is dead; 0 on systems without /proc."""
    try:
        if not Path("/proc/self/stat").exists():
            with contextlib.suppress(PermissionError):  # it lives and belongs to another user
                os.kill(pid, 0)
            return 0
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    state, start = fields[0], fields[19]
    return -1 if state in "ZX" else int(start)


def _renew(path: Path, done: threading.Event) -> None:
    while not done.wait(RENEWAL_SECONDS):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
