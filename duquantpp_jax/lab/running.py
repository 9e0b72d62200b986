"""Runs a grid: every cell once, by any number of processes, any of which may be killed.

All processes do the same (`work`): take the next cell that has no record, claim it, look again,
measure it, record it, release it. They share nothing but the directory.
"""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from duquantpp_jax.evaluation.subject import environment
from duquantpp_jax.lab import claims, records
from duquantpp_jax.lab.bench import CACHE_BYTES, Bench, order
from duquantpp_jax.lab.cells import Cell
from duquantpp_jax.lab.records import Record

CLAIMS = ".claims"
WAIT_SECONDS = 0.5

Executor = Callable[[list[Cell], Path, int, Callable[[], None]], None]
"""Runs `work` in some processes until every cell has a record; raises ValueError if cells are left.
Takes the cells, in an order in which neighbours share work; the directory of records; the bound on
kept log-probabilities, in bytes for each process; and a function that it calls now and then."""


class Outcome(NamedTuple):
    """Records of the finished cells of a grid, in its order, and why the others failed."""

    records: dict[Cell, Record]
    errors: dict[Cell, str]


def run(
    cells: Iterable[Cell],
    out: str | os.PathLike[str],
    executor: Executor | None = None,
    *,
    cache_bytes: int = CACHE_BYTES,
    progress: Callable[[int, int, int], None] = lambda *_: None,
) -> Outcome:
    """Measures the cells of a grid that have no record yet.

    >>> given = {"model": "model", "text": "text.txt", "calibration_text": "text.txt"}
    >>> cells = [Cell("rtn", "mxfp4", **given, tokens=5110, calibration_tokens=4088)]
    >>> outcome = run(cells, "records")
    >>> [record["metrics"]["kl"] > 0 for record in outcome.records.values()], outcome.errors
    ([True], {})

    Args:
      cells: The grid; cells of one configuration count once.
      out: Directory of records; grids and simultaneous runs may share it.
      executor: Where the work is done; None is this process.
      cache_bytes: Bound on the log-probabilities that each process keeps.
      progress: Called with the numbers of finished cells, of failed cells, and of all cells.

    Raises:
      ValueError: A cell's configuration is wrong (nothing has run then), or processes died.
    """
    grid = list({cell.digest: cell for cell in cells}.values())
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for cell in grid:  # failed cells are tried again
        records.path_of(out, cell, failed=True).unlink(missing_ok=True)

    check_unmixed(grid, out, own=executor is None)

    def tick() -> None:
        paths = set(out.iterdir())
        wrong = sum(records.path_of(out, cell, failed=True) in paths for cell in grid)
        progress(sum(records.path_of(out, cell) in paths for cell in grid), wrong, len(grid))

    tick()
    if not all(records.path_of(out, cell).exists() for cell in grid):
        (executor or work)(order(grid), out, cache_bytes, tick)
    claims.forget(out / CLAIMS, {cell.digest for cell in grid if records.is_recorded(out, cell)})
    check_unmixed(grid, out, own=False)
    return outcome(grid, out)


def check_unmixed(cells: Iterable[Cell], out: Path, *, own: bool = True) -> None:
    """Checks the records of a grid before more are added to them.

    Args:
      own: Whether cells without a record are to be measured in this process.

    Raises:
      ValueError: A record is broken, or the numbers of some differ by where they were measured.
    """
    cells = list(cells)
    found = list(outcome(cells, out).records.values())
    if own and 0 < len(found) < len(cells):
        found.append({"environment": environment()})
    if found and (how := records.mixed(found)):
        raise ValueError(
            f"{out} has cells that were measured with {how}, whose numbers are not to be mixed: "
            "give another --out, or measure them alike (PJRT_NPROC and OPENBLAS_NUM_THREADS set "
            "the threads)"
        )


def outcome(cells: Iterable[Cell], out: Path) -> Outcome:
    """The recorded results of a grid; without the cells that have no record."""
    found = Outcome({}, {})
    for cell in cells:
        if record := records.read(out, cell):
            found.records[cell] = record
        elif record := records.read(out, cell, failed=True):
            found.errors[cell] = record["error"]
    return found


def work(
    cells: list[Cell],
    out: Path,
    cache_bytes: int = CACHE_BYTES,
    tick: Callable[[], None] = lambda: None,
    *,
    first: int = 0,
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Measures cells until all have a record; waits for those that other processes hold.

    Args:
      tick: Called after each cell.
      first: Index of the cell to begin with.
      wanted: Called before each cell; the work stops when it returns False.
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
            with claims.claim(place, cell.digest) as ours:
                if ours and not records.is_recorded(out, cell):
                    _measure(bench, cell, out)
                    tick()
        if left := [cell for cell in left if not records.is_recorded(out, cell)]:
            time.sleep(WAIT_SECONDS)


def _measure(bench: Bench, cell: Cell, out: Path) -> None:
    try:
        records.write(out, cell, bench.run(cell))
    except OSError:
        raise  # the directory is at fault, not the cell
    except Exception as error:  # a cell may fail in any way: record the failure and go on
        records.write_error(out, cell, error)
