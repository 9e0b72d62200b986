"""Processes of one or several hosts as one program, by jax.distributed; only where it is asked for.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID       say who they are, or
    Slurm, Open MPI, Kubernetes, a TPU pod                           as JAX finds them by itself

Every process runs the same command. They share the rows of each batch; the first alone prints and
writes, and what it writes all others can read, as on a file system of a cluster.
"""

import contextlib
import dataclasses
import hashlib
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from duquantpp_jax.core.notices import warn
from duquantpp_jax.files import one_line

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LOST = ("Gloo", "DEADLINE_EXCEEDED", "UNAVAILABLE", "coordination")
"""What JAX's errors have in them where another process is missed."""
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_joined: list[bool] = []
"""Has an entry while this process is joined to others by a command."""


@contextlib.contextmanager
def as_one_of_several(options: Any, *, shared: bool = False) -> Iterator[Any]:
    """A block in which this process is one of several, with the options that it goes by.

    Args:
      options: Of a command; if they do not ask for it, nothing is done.
      shared: All processes read what the first writes to --out; else those of the others go
        nowhere.

    Raises:
      ValueError: There are no processes to join, they were asked for different things, or another
        has ended.
    """
    if not options.distributed:
        yield options
        return
    meet_others()
    try:
        check_alike(options)
        if is_first():
            yield options
        else:
            with silent(), tempfile.TemporaryDirectory() as nowhere:
                yield options if shared else _writing_to(Path(nowhere), options)
        jax.distributed.shutdown()  # waits for the others; after an error see leave_at_once
        _joined.clear()
    except jax.errors.JaxRuntimeError as error:
        if not any(word in str(error) for word in LOST):
            raise
        raise ValueError(
            f"another process has ended, or did not come so far ({one_line(error)}): see what it "
            "said, and start all of them again"
        ) from None


def check_alike(options: Any) -> None:
    """Raises ValueError in every process if not all were asked for the same."""
    asked = {n: v for n, v in dataclasses.asdict(options).items() if n != "terminal"}
    digest = hashlib.sha256(repr(asked).encode()).digest()
    found = in_every_process(np.frombuffer(digest, np.uint8)).reshape(-1, len(digest))
    if other := [number for number, its in enumerate(found) if its.tobytes() != found[0].tobytes()]:
        raise ValueError(
            f"process {other[0]} was asked for something else than process 0: give all of them "
            "the same options"
        )


def in_every_process(array: UInt8[np.ndarray, " bytes"]) -> UInt8[np.ndarray, "*processes"]:
    """The arrays of all processes, in each of them."""
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(array))


def meet_others() -> None:
    """Joins the processes of this program; ValueError if there are none."""
    given = [os.environ.get(name) for name in VARIABLES]
    if any(given) and not all(given):
        missing = [n for n, value in zip(VARIABLES, given, strict=True) if not value]
        raise ValueError(f"--distributed needs {' and '.join(missing)} beside the others of them")
    address, count, number = given
    handlers = {each: signal.getsignal(each) for each in SIGNALS}
    those = f"{count} processes at {address} as number {number}" if all(given) else "this job"
    warn(f"joining {those}: the others have five minutes to come")
    # Handlers in Python would come to nothing while it waits; what is ignored stays so (nohup).
    _handle({each: signal.SIG_DFL for each, handler in handlers.items() if callable(handler)})
    try:
        if address and count and number:
            jax.distributed.initialize(address, int(count), int(number))
        else:
            jax.distributed.initialize()
        _joined.append(True)
    except (ValueError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"--distributed found no processes to join ({one_line(error)}): start it with srun or "
            f"mpirun, or set {', '.join(VARIABLES)}"
        ) from None
    finally:  # a service of jax.distributed puts its own in their place
        _handle(handlers)


def _handle(handlers: Mapping[signal.Signals, Any]) -> None:
    """Handles signals so, where Python lets this thread."""
    for each, handler in handlers.items():
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(each, handler)


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def leave_at_once(code: int) -> None:
    """Ends a process that has joined others and come to an error.

    At its usual end JAX would wait for the others for up to five minutes. Ended at once, it is
    missed by them when they next add up with it.
    """
    if not (_joined and jax.distributed.is_initialized()):
        return
    if sys.exc_info()[1] is not None:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or a full disk
            stream.flush()
    os._exit(code)


def wait_for_all(where: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(where)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """A block that prints nothing."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
            contextlib.redirect_stderr(nowhere):  # fmt: skip
        yield


def _writing_to(nowhere: Path, options: Any) -> Any:
    """The options with all that is written in a directory that is removed."""
    names = {field.name for field in dataclasses.fields(options)}
    paths = [n for n in ("out", "report") if n in names and getattr(options, n) is not None]
    return dataclasses.replace(options, **{name: nowhere / name for name in paths})
