"""Executors: where the cells of a grid are measured. This process is `running.in_process`.

    Processes    N processes of this machine, each on its share of the cores, or each on a GPU
    Slurm        N jobs of a cluster, through submitit (extra `slurm`); its local form needs none

All of them run `running.work` on the same cells and the same directory, so that they may be
mixed, killed and started again.
"""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal

from duquantpp_jax.lab import records
from duquantpp_jax.lab.cells import Cell
from duquantpp_jax.lab.running import WAIT_SECONDS, work

STARTS = 3
"""How often, for each worker, processes are started; then those that die are not replaced."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """Worker processes of this machine, started afresh (JAX does not survive a fork).

    Attributes:
      workers: How many.
      devices: What each may see as CUDA_VISIBLE_DEVICES; without any, workers share the cores.
    """

    workers: int
    devices: tuple[str, ...] = ()

    def __call__(
        self, cells: list[Cell], out: Path, cache_bytes: int, tick: Callable[[], None]
    ) -> None:
        """See `running.Executor`. A worker that is killed is replaced, and its cell tried again."""
        starts = STARTS * self.workers
        running = dict.fromkeys(range(min(self.workers, len(cells))))
        try:
            while True:
                for number, process in running.items():
                    dead = process is not None and not process.is_alive() and process.exitcode != 0
                    if (process is None or dead) and starts > 0:
                        starts -= 1
                        running[number] = self._start(number, cells, out, cache_bytes)
                alive = [p for p in running.values() if p is not None and p.is_alive()]
                tick()
                if not alive:
                    break
                multiprocessing.connection.wait([p.sentinel for p in alive], WAIT_SECONDS)
        finally:
            for process in running.values():
                if process is not None:
                    process.kill()
                    process.join()
        _check_all_recorded(cells, out, f"{self.workers} worker processes died (out of memory?)")

    def _start(self, number: int, cells: list[Cell], out: Path, cache_bytes: int) -> SpawnProcess:
        given = {"CUDA_VISIBLE_DEVICES": self.devices[number]} if self.devices else {}
        first = number * len(cells) // self.workers
        cores = [] if self.devices else _share_of_cores(number, self.workers)
        context = multiprocessing.get_context("spawn")
        process = context.Process(
            target=_worker, args=(cells, out, cache_bytes, first, cores), daemon=True
        )
        with _environment(given):  # before JAX starts in the child, which reads it then
            process.start()
        return process


def gpus(devices: int | None = None) -> Processes:
    """One worker for each GPU of this machine that CUDA_VISIBLE_DEVICES lets it see.

    Args:
      devices: How many at most.

    Raises:
      ValueError: There is none.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = (
        [name for name in visible.split(",") if name]
        if visible is not None
        else [str(i) for i in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]
    )
    if not names:
        raise ValueError("no NVIDIA GPU is visible: choose --executor processes")
    names = names[:devices]
    return Processes(len(names), tuple(names))


@dataclasses.dataclass(frozen=True)
class Slurm:
    """Jobs of a Slurm cluster, through submitit.

    Attributes:
      jobs: How many; each measures cells until none is left.
      parameters: As `submitit.AutoExecutor.update_parameters` takes them, e.g.
        (("timeout_min", 600), ("slurm_partition", "gpu"), ("gpus_per_node", 1)).
      cluster: "local" runs the jobs as processes of this machine instead.
    """

    jobs: int
    parameters: tuple[tuple[str, str | int], ...] = ()
    cluster: Literal["slurm", "local"] = "slurm"

    def __call__(
        self, cells: list[Cell], out: Path, cache_bytes: int, tick: Callable[[], None]
    ) -> None:
        """See `running.Executor`. A job that ends early leaves its cells to the others.

        Raises:
          ValueError: submitit is not installed, or cells are left when all jobs have ended.
        """
        executor = _submitit().AutoExecutor(folder=out / ".slurm", cluster=self.cluster)
        executor.update_parameters(**{"timeout_min": 24 * 60} | dict(self.parameters))
        jobs = [
            executor.submit(
                work, cells, out.resolve(), cache_bytes, first=i * len(cells) // self.jobs
            )
            for i in range(min(self.jobs, len(cells)))
        ]
        try:
            while not all(job.done() for job in jobs):
                tick()
                time.sleep(WAIT_SECONDS)
        except BaseException:
            for job in jobs:
                job.cancel()
            raise
        tick()
        _check_all_recorded(cells, out, f"{len(jobs)} jobs ended early (see {out / '.slurm'})")


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise ValueError(
            "--executor slurm needs submitit: pip install 'duquantpp_jax[slurm]'"
        ) from None
    return submitit


def _worker(cells: list[Cell], out: Path, cache_bytes: int, first: int, cores: list[int]) -> None:
    """What a worker process does; it stops after its cell if the process that started it dies."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if cores:
        os.sched_setaffinity(0, cores)  # XLA's thread pool is as large as this set
    parent = multiprocessing.parent_process()
    work(cells, out, cache_bytes, first=first, wanted=lambda: parent is None or parent.is_alive())


def _share_of_cores(number: int, workers: int) -> list[int]:
    """The cores of one worker, all as many; none where they cannot be given or do not suffice."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // workers
    return cores[number * each : (number + 1) * each]


@contextlib.contextmanager
def _environment(given: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _check_all_recorded(cells: list[Cell], out: Path, why: str) -> None:
    left = sum(not records.is_recorded(out, cell) for cell in cells)
    if left:
        raise ValueError(f"{why}: {left} cells are left, run again to go on")
