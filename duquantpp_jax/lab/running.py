"""Running a grid: every cell once, by any number of processes, killed and resumed at will.

    run(cells, out, executor)     finished cells are read, the others measured, failures recorded

All processes do the same (`work`): take the next cell that has no record, claim it, look again,
measure it, record it, release it. Nothing else is shared, so any of them may die at any moment.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from duquantpp_jax.lab import claims, records
from duquantpp_jax.lab.bench import CACHE_BYTES, Bench, order
from duquantpp_jax.lab.cells import Cell
from duquantpp_jax.lab.records import Record

CLAIMS = ".claims"
WAIT_SECONDS = 0.5

Progress = Callable[[int, int, int], None]
"""Called with how many cells are finished, failed, and there in all."""


Executor = Callable[[list[Cell], Path, int, Callable[[], None]], None]
"""Has cells without record measured by `work` in some processes, and returns when they are, or
raises ValueError if some are left. Called with the cells, in an order in which neighbours share;
the directory of records; the bound on log-probabilities kept, in each process; and a function to
be called now and then."""


class Outcome(NamedTuple):
    """What is known of a grid after a run.

    Attributes:
      records: Of the finished cells, in the order of the grid.
      errors: Why the others failed.
    """

    records: dict[Cell, Record]
    errors: dict[Cell, str]


def run(
    cells: Iterable[Cell],
    out: Path,
    executor: Executor | None = None,
    *,
    cache_bytes: int = CACHE_BYTES,
    progress: Progress = lambda *_: None,
) -> Outcome:
    """Measures the cells of a grid that have no record yet.

    Args:
      cells: The grid; cells of one configuration count once.
      out: Directory of records; may be shared by grids, and by runs at the same time.
      executor: Where the work is done; None is this process.
      cache_bytes: Bound on the float model's log-probabilities kept, on the device of each
        process.

    Raises:
      ValueError: A cell's configuration is no good (nothing has run then), or processes died.
    """
    grid = list({cell.digest: cell for cell in cells}.values())
    out.mkdir(parents=True, exist_ok=True)
    records.forget_failures(out, grid)

    def tick() -> None:
        names = {path.name for path in out.iterdir()}
        done, failed = (
            sum(records.path_of(out, cell, failed=failed).name in names for cell in grid)
            for failed in (False, True)
        )
        progress(done, failed, len(grid))

    tick()
    left = [cell for cell in grid if not records.path_of(out, cell).exists()]
    if left:
        (executor or in_process)(order(left), out, cache_bytes, tick)
    claims.forget(out / CLAIMS, {cell.digest for cell in grid if records.is_recorded(out, cell)})
    return outcome(grid, out)


def outcome(cells: Iterable[Cell], out: Path) -> Outcome:
    """What the records say of a grid; cells without any are in neither part."""
    finished = {cell: record for cell in cells if (record := records.read(out, cell))}
    failed = {
        cell: error
        for cell in cells
        if cell not in finished and (error := records.read_error(out, cell))
    }
    return Outcome(finished, failed)


def in_process(cells: list[Cell], out: Path, cache_bytes: int, tick: Callable[[], None]) -> None:
    """The executor that works in this process."""
    work(cells, out, cache_bytes, tick=tick)


def work(
    cells: list[Cell],
    out: Path,
    cache_bytes: int = CACHE_BYTES,
    *,
    first: int = 0,
    tick: Callable[[], None] = lambda: None,
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Measures cells until all have a record; waits for those that other processes hold.

    Args:
      cells: In an order in which neighbours share.
      first: The cell to begin with.
      tick: Called after each cell.
      wanted: Asked before each cell; the work stops when it says no.
    """
    place = out / CLAIMS
    place.mkdir(exist_ok=True)
    bench = Bench(cache_bytes)
    left = cells[first:] + cells[:first]
    while left:
        for cell in left:
            if not wanted():
                return
            if records.is_recorded(out, cell):
                continue
            with claims.held(place, cell.digest) as ours:
                if ours and not records.is_recorded(out, cell):
                    _measure(bench, cell, out)
                    tick()
        left = [cell for cell in left if not records.is_recorded(out, cell)]
        if left:
            time.sleep(WAIT_SECONDS)


def _measure(bench: Bench, cell: Cell, out: Path) -> None:
    try:
        records.write(out, cell, bench.run(cell))
    except OSError:
        raise  # the directory, not the cell
    except Exception as error:  # whatever a cell does, the sweep goes on and the record says it
        records.write_error(out, cell, error)
