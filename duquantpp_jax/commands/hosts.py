"""Processes of one or several hosts as one program, by jax.distributed; only where it is asked for.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID       say who they are, or
    Slurm, Open MPI, Kubernetes, a TPU pod                           as JAX finds them by itself

Every process runs the same command. They share the rows of each batch; the first alone prints and
writes, and what it writes all others can read, as on a file system of a cluster.
"""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from duquantpp_jax.files import one_line

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@contextlib.contextmanager
def as_one_of_several(options: Any, *, shared: bool = False) -> Iterator[Any]:
    """A block in which this process is one of several, with the options that it goes by.

    Args:
      options: Of a command; if they do not ask for it, nothing is done.
      shared: All processes read what the first writes to --out; else those of the others go
        nowhere.

    Raises:
      ValueError: There are no processes to join.
    """
    if not options.distributed:
        yield options
        return
    meet_others()
    try:
        if is_first():
            yield options
        else:
            with silent(), tempfile.TemporaryDirectory() as nowhere:
                yield options if shared else _writing_to(Path(nowhere), options)
    finally:
        jax.distributed.shutdown()


def meet_others() -> None:
    """Joins the processes of this program; ValueError if there are none."""
    given = [os.environ.get(name) for name in VARIABLES]
    if any(given) and not all(given):
        missing = [n for n, value in zip(VARIABLES, given, strict=True) if not value]
        raise ValueError(f"--distributed needs {' and '.join(missing)} beside the others of them")
    address, count, number = given
    try:
        if address and count and number:
            jax.distributed.initialize(address, int(count), int(number))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed found no processes to join ({one_line(error)}): start it with srun or "
            f"mpirun, or set {', '.join(VARIABLES)}"
        ) from None


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


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
