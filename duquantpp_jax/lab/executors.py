"""Executors: processes of this machine, or jobs of a cluster, that measure the cells of a grid.

All run `running.work` on the same cells and the same directory. So they may be mixed, killed and
started again.
"""

import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal

from duquantpp_jax import files
from duquantpp_jax.core.notices import warn
from duquantpp_jax.files import processes
from duquantpp_jax.lab import claims, records
from duquantpp_jax.lab.cells import Cell
from duquantpp_jax.lab.running import CLAIMS, WAIT_SECONDS, check_unmixed, work
from duquantpp_jax.recipes import import_modules

STARTS = 3
"""Processes started for each worker at most: the first, and then for those that die."""
REFUSED = 2
"""Exit code of a worker that must not go on, and has said why; no other is started for it."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
JOBS = ".slurm"
"""In the directory of records: what submitit writes, and the process of each job."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """Worker processes of this machine, spawned (JAX does not survive a fork). Each has its own
    of the `devices`, as CUDA_VISIBLE_DEVICES; without any they share the cores. Each imports the
    modules of `imports` first."""

    workers: int
    devices: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()

    def __call__(
        self, cells: list[Cell], out: Path, cache_bytes: int, tick: Callable[[], None]
    ) -> None:
        """See `running.Executor`. A killed worker is replaced, and its cell is measured again."""
        starts, running = STARTS * self.workers, dict[int, SpawnProcess]()
        try:
            while True:
                codes = {number: process.exitcode for number, process in running.items()}
                for number in range(min(self.workers, len(cells))):
                    dead = codes.get(number, 1) not in (None, 0, REFUSED)
                    if dead and number in running:
                        _say_died(number, running.pop(number), cells, out, again=starts > 0)
                    if dead and starts > 0:
                        starts -= 1
                        running[number] = self._start(number, cells, out, cache_bytes)
                        codes[number] = None
                # By the same codes: a worker that has died since then has still to be spoken of.
                alive = [p for number, p in running.items() if codes[number] is None]
                tick()
                if not alive:
                    break
                multiprocessing.connection.wait([p.sentinel for p in alive], WAIT_SECONDS)
        finally:
            for process in running.values():
                process.kill()
                process.join()
        _check_all_recorded(cells, out, f"{self.workers} worker processes died (out of memory?)")

    def _start(self, number: int, cells: list[Cell], out: Path, cache_bytes: int) -> SpawnProcess:
        first = number * len(cells) // self.workers
        cores = [] if self.devices else _share_of_cores(number, self.workers)
        process = multiprocessing.get_context("spawn").Process(
            target=_worker, args=(cells, out, cache_bytes, first, cores, self.imports), daemon=True
        )
        before = os.environ.get(VISIBLE)
        try:
            if self.devices:  # set before the child starts: its JAX reads the variable once
                os.environ[VISIBLE] = self.devices[number]
            process.start()
        finally:
            os.environ.pop(VISIBLE, None)
            if before is not None:
                os.environ[VISIBLE] = before
        return process


def gpus(devices: int | None = None, imports: tuple[str, ...] = ()) -> Processes:
    """One worker for each NVIDIA GPU that this process may see, for `devices` at most."""
    present = [str(i) for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
    visible = os.environ.get(VISIBLE)
    names = present if visible is None else [name for name in visible.split(",") if name]
    if not names:
        raise ValueError("no NVIDIA GPU is visible: choose --executor processes")
    return Processes(len(names[:devices]), tuple(names[:devices]), imports)


@dataclasses.dataclass(frozen=True)
class Slurm:
    """Jobs of a Slurm cluster, through submitit (extra `slurm`).

    Attributes:
      jobs: How many; each measures cells until none is left.
      parameters: Arguments of `submitit.AutoExecutor.update_parameters`, e.g.
        (("timeout_min", 600), ("slurm_partition", "gpu"), ("gpus_per_node", 1)).
      cluster: "local" runs the jobs as processes of this machine instead.
      imports: Modules that each job imports first.
    """

    jobs: int
    parameters: tuple[tuple[str, str | int], ...] = ()
    cluster: Literal["slurm", "local"] = "slurm"
    imports: tuple[str, ...] = ()

    def __call__(
        self, cells: list[Cell], out: Path, cache_bytes: int, tick: Callable[[], None]
    ) -> None:
        """See `running.Executor`. A job that ends early leaves its cells to the others.

        Raises:
          ValueError: submitit is not installed or finds no cluster, or cells are left when all
            jobs have ended.
        """
        try:
            import submitit
        except ImportError:
            needs = "--executor slurm needs submitit: pip install 'duquantpp_jax[slurm]'"
            raise ValueError(needs) from None
        try:
            executor = submitit.AutoExecutor(folder=out / JOBS, cluster=self.cluster)
        except RuntimeError as error:  # no srun here
            raise ValueError(f"{error}: choose --executor processes or gpus") from None
        executor.update_parameters(**{"timeout_min": 24 * 60} | dict(self.parameters))
        arguments = cells, out.resolve(), cache_bytes
        firsts = [i * len(cells) // self.jobs for i in range(min(self.jobs, len(cells)))]
        jobs = [executor.submit(_job, *arguments, first, self.imports) for first in firsts]
        running = jobs
        try:
            while running := [job for job in running if not _has_ended(job, cells, out)]:
                tick()
                time.sleep(WAIT_SECONDS)
        except BaseException:
            for job in jobs:
                job.cancel()
            raise
        tick()
        _check_all_recorded(cells, out, f"{len(jobs)} jobs ended early (see {out / JOBS})")


def _job(
    cells: list[Cell], out: Path, cache_bytes: int, first: int, imports: tuple[str, ...]
) -> None:
    """Works until no cell is left."""
    import submitit

    own = _process_of(out, submitit.JobEnvironment().job_id)
    files.write_whole(own, files.to_json(processes.process()))
    import_modules(imports)
    check_unmixed(cells, out)
    work(cells, out, cache_bytes, first=first)


def _worker(
    cells: list[Cell],
    out: Path,
    cache_bytes: int,
    first: int,
    cores: list[int],
    imports: tuple[str, ...],
) -> None:
    """Works until no cell is left; stops after a cell if the parent process is dead."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if cores:
        os.sched_setaffinity(0, cores)  # XLA's thread pool is as large as this set
    import_modules(imports)
    parent = multiprocessing.parent_process()
    try:
        check_unmixed(cells, out)
        wanted = lambda: parent is None or parent.is_alive()  # noqa: E731
        work(cells, out, cache_bytes, first=first, wanted=wanted)
    except (ValueError, OSError) as error:
        print(f"duquantpp: {files.one_line(error)}", file=sys.stderr)
        sys.exit(REFUSED)


def _say_died(
    number: int, process: SpawnProcess, cells: list[Cell], out: Path, *, again: bool
) -> None:
    """Warns of a worker that is dead; names its cell, and what killed it."""
    code, pid = process.exitcode or 0, process.pid or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    at = _at({"host": processes.host(), "pid": pid}, cells, out)
    goes_on = "it is replaced, and the cell measured again" if again else "it is not replaced"
    warn("worker %d (process %d) %s%s: %s", number + 1, pid, how, at, goes_on)


def _has_ended(job: Any, cells: list[Cell], out: Path) -> bool:
    """Whether a job of submitit is done; warns if it did not end well, and names its cell."""
    if not job.done():
        return False
    if job.exception() is not None:
        path, at = _process_of(out, job.job_id), ""
        if path.is_file():
            at = _at(files.read_json(path), cells, out)
        goes_on = "its cells are left to other jobs, if any runs"
        warn("job %s ended early (%s)%s: %s", job.job_id, job.state, at, goes_on)
    return True


def _process_of(out: Path, job: str) -> Path:
    """The file in which a job of submitit names its process."""
    return out / JOBS / f"{job}_process.json"


def _at(holder: Mapping[str, str | int], cells: list[Cell], out: Path) -> str:
    """The cells that a dead process had claimed, in words."""
    left = claims.left_by(out / CLAIMS, holder)
    names = [cell.labels() for cell in cells if cell.digest in left]
    return f" at {'; '.join(names)}" if names else ""


def _share_of_cores(number: int, workers: int) -> list[int]:
    """The worker's equal share of the cores; empty where shares cannot be set or there are fewer
    cores than workers."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // workers
    return cores[number * each : (number + 1) * each]


def _check_all_recorded(cells: list[Cell], out: Path, why: str) -> None:
    if left := sum(not records.is_recorded(out, cell) for cell in cells):
        raise ValueError(f"{why}: {left} cells are left, run again to go on")
