"""Processes: their names, and directories that one of them at a time writes to.

A name is told apart from that of any later process, so that what a dead process left is known by
the name in it. A lock is the system's, and ends with its process.
"""

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

LOCK = ".lock"
"""In a directory that a process writes to; the end of the lock's name beside a single file."""


def process(pid: int | None = None) -> dict[str, str | int]:
    """Names a process of this machine, by default this one: a later one of its pid has another
    start. The start is in the system's ticks; -1 if it is dead; 0 on systems without /proc."""
    pid = os.getpid() if pid is None else pid
    return {"host": host(), "pid": pid, "start": _start(pid)}


def host() -> str:
    """The place where a pid names one process: the machine, and in a container its own pids."""
    pids = ""
    with contextlib.suppress(OSError):  # of Linux
        pids = " " + os.readlink("/proc/self/ns/pid")
    return socket.gethostname() + pids


def _start(pid: int) -> int:
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


@contextlib.contextmanager
def only_process(out: Path, *, single: bool = False) -> Iterator[bool]:
    """A block in which no other process writes to a directory, which is made if there is none.

    Directories that were made are removed at the end if they are empty. Yields False where the file
    system has no locks: others may write there then.

    Args:
      single: `out` is one file, and others in its directory may be written meanwhile.

    Raises:
      ValueError: Another process writes there.
    """
    lock = out.with_name(f".{out.name}{LOCK}") if single else out / LOCK
    made, alone = [place for place in lock.parents if not place.exists()], None
    while alone is None:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = lock.open("a")
        except FileNotFoundError:  # another process has just removed the directory
            continue
        with file:
            if (alone := _lock(file, lock, out)) is None:
                continue
            try:
                yield alone
            finally:
                lock.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # it is not empty
                    for place in made:
                        place.rmdir()


def _lock(file: TextIO, lock: Path, out: Path) -> bool | None:
    """Whether the file is locked, for as long as it is open; None if its holder has just removed
    it, so that the next one locks another file."""
    try:
        import fcntl  # of POSIX

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(taken(out)) from None
    except (ImportError, OSError):
        return False
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            return True
    return None


def give_back_memory() -> None:
    """Returns freed memory to the system: glibc keeps it in pieces, and a process seems to grow."""
    with contextlib.suppress(OSError, AttributeError):  # other libraries have no such call
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def taken(out: Path) -> str:
    """What is said where two processes write to one place."""
    return f"{out} is being written by another process: wait for it, or give another --out"
