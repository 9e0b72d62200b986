"""Claims: which process works on what, without locks, and with no claim outliving its process.

A claim on NAME is a file NAME.0 that says who holds it, made whole and only if there was none (a
hard link to a finished file). If its holder is dead it stays, and whoever makes NAME.1 holds the
claim in its place; then NAME.2, and so on: of several that find a holder dead, one succeeds, and
none takes a live claim away. A holder is dead if this machine has no such process, or one that
started at another time; on another machine, if the file was not renewed for fifteen minutes.

Whoever holds a claim looks whether the work is done before it works, and records the work before
it releases, so that work is done once.
"""

import contextlib
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
"""After so long without renewal a claim of another machine is its dead holder's."""


@contextlib.contextmanager
def held(directory: Path, name: str) -> Iterator[bool]:
    """Whether this process now holds the claim on `name`; it is released at the end.

    Args:
      directory: Of claims, on a file system with hard links.
    """
    path = _acquire(directory, name)
    if path is None:
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
        for claim in directory.glob(f"{name}.*"):
            claim.unlink(missing_ok=True)


def forget(directory: Path, names: set[str]) -> None:
    """Removes claims on work that is recorded: of processes killed before they released them."""
    for claim in directory.glob("*.*"):
        if claim.name.partition(".")[0] in names:
            claim.unlink(missing_ok=True)


def _acquire(directory: Path, name: str) -> Path | None:
    generation = 0
    while True:
        path = directory / f"{name}.{generation}"
        if _create(path):
            return path
        if _is_live(path):
            return None
        generation += 1


def _create(path: Path) -> bool:
    handle, temporary = tempfile.mkstemp(prefix=".claim.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(_holder(os.getpid()), file)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    return True


def _is_live(path: Path) -> bool:
    """Whether the holder lives; a claim that has just been released counts as live."""
    try:
        holder, renewed = json.loads(path.read_text()), path.stat().st_mtime
    except FileNotFoundError:
        return True
    if holder["host"] != socket.gethostname():
        return time.time() - renewed < STALE_SECONDS
    return _holder(holder["pid"]) == holder


def _holder(pid: int) -> dict[str, str | int]:
    """Host, process and its start: two processes with one number differ in it."""
    return {"host": socket.gethostname(), "pid": pid, "start": _start(pid)}


def _start(pid: int) -> int:
    """When a process started, in the system's ticks; -1 if it is dead; 0 where /proc is not."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return -1
        except PermissionError:
            pass  # it lives, and is another user's
        return 0
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    state, start = fields[0], fields[19]
    return -1 if state in "ZX" else int(start)


def _renew(path: Path, done: threading.Event) -> None:
    while not done.wait(RENEWAL_SECONDS):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
