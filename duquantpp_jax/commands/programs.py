"""Compiled programs, kept for the next command.

They stand in $DUQUANTPP_CACHE, else ~/.cache/duquantpp_jax, in a directory for each kind of
processor: machine code of one may not run on another. JAX's own directory of programs grows without
end, and a kill may leave half a program there. So a command works in a directory of its own, which
starts with links to all that are kept; at its end it renames the new programs, which are whole, to
the place for all, and deletes the oldest beyond BOUND bytes. A command that was killed or
interrupted keeps nothing, and where nothing can be written, nothing is kept.

JAX's own options go first: JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing, and
JAX_COMPILATION_CACHE_DIR names another directory, which JAX then keeps as it does. A program is
code, so a directory that others may write to is not used.
"""

import contextlib
import hashlib
import os
import platform
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from duquantpp_jax.files import cache_directory

BOUND = 512 << 20
"""Bytes of all kept programs of a processor."""
PROGRAMS = "*-cache"
"""The names that JAX gives to files of programs."""


@contextlib.contextmanager
def kept_programs() -> Iterator[None]:
    """Within the block, JAX finds the programs of earlier commands; at its end, new ones are kept.

    Nothing changes where JAX has a directory of programs already, or was told to keep none.
    """
    own = None
    if not jax.config.jax_compilation_cache_dir and jax.config.jax_enable_compilation_cache:
        with contextlib.suppress(OSError):
            own = _own_directory(_place())
    if own is None:
        yield
        return
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    _use(str(own), 0.0)
    try:
        yield
        with contextlib.suppress(OSError):
            _keep(own)
    finally:
        _use(None, least)
        shutil.rmtree(own, ignore_errors=True)


def _use(directory: str | None, least_seconds: float) -> None:
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    compilation_cache.reset_cache()


def _place() -> Path:
    """The directory of this processor, by its name and its instructions."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        told = sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))})
        about = "\n".join([platform.machine(), *told])
        return cache_directory() / "programs" / hashlib.sha256(about.encode()).hexdigest()[:16]
    return cache_directory() / "programs" / f"{platform.machine()}-{platform.processor()}"


def _own_directory(place: Path) -> Path | None:
    """A new directory with links to all kept programs; None where others may write to them."""
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = place.stat()
    if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return None
    mark = f".{socket.gethostname()}."
    for left in place.glob(f"{mark}*"):  # of commands that were killed
        host, _, pid = left.name.rpartition(".")[0].rpartition(".")
        if f"{host}." != mark or not pid.isdigit():
            continue
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except PermissionError:  # it runs, for another user
            pass
    own = Path(tempfile.mkdtemp(prefix=f"{mark}{os.getpid()}.", dir=place))
    try:
        for program in place.glob(PROGRAMS):
            with contextlib.suppress(FileNotFoundError):  # another command has just deleted it
                os.link(program, own / program.name)
    except OSError:
        shutil.rmtree(own, ignore_errors=True)
        raise
    return own


def _keep(own: Path) -> None:
    """Renames the new programs to the place for all, and deletes the oldest beyond the bound."""
    place = own.parent
    for program in own.glob(PROGRAMS):
        os.replace(program, place / program.name)
    used = sorted((max(p.stat().st_atime, p.stat().st_mtime), p) for p in place.glob(PROGRAMS))
    size = sum(path.stat().st_size for _, path in used)
    for _, path in used:
        if size <= BOUND:
            break
        size -= path.stat().st_size
        path.unlink()
