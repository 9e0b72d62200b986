"""How much faster is a grid than its cells one by one, and how does its time grow?

The grid is 8 transforms x 3 scale rules on the embedded model. It is compared with the same cells
as separate `duquantpp compare` processes, one recipe and one rule each. A few of these are timed,
and their mean stands for all; --separate 24 times all. Then the grid runs again, with half the
cells and with half the tokens. Each grid runs in a process of its own, imports included, as a user
would start it. None finds compiled programs.
Goal: at least 4 times faster on 2 cores at 16,352 targets.
Command: python -m experiments.bench_ablation [--tokens N] [--separate N] [--recipes N]
Cost: 7 minutes on 2 CPU cores.
Last result, 2026-11-25, 2 CPU cores to itself, jax 0.12.0.1: 15.9 s a compare process (13.7 to
19.6, six timed), 380 s for 24; the grid 90.8 s, 4.2 times faster. 12 of its cells 49.9 s, half the
targets 69.8 s: a cell more costs 3.4 s, 1,000 targets more .11 s a cell.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.lab import Cell

RECIPES = (
    "rtn",
    "block_hadamard",
    "random_hadamard",
    "smooth",
    "smooth_hadamard",
    "greedy",
    "duquantpp",
    "wush",
)
RULES = ("floor", "even", "log256")
CELLS = [Cell(recipe, rule) for recipe in RECIPES for rule in RULES]
BASELINE = "block_hadamard"


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def grid_seconds(cells: list[Cell], tokens: int, workers: int) -> float:
    """Seconds of one `duquantpp ablate` in a new process."""
    with tempfile.TemporaryDirectory() as place:
        only = sorted({cell.recipe for cell in cells})
        given = ["--tokens", str(tokens), "--out", place, "--workers", str(workers), "--only"]
        return _seconds(["experiments.bench_ablation", "--grid", *given, *only])


def compare_seconds(cell: Cell, tokens: int) -> float:
    """Seconds of one `duquantpp compare` of one recipe and one rule."""
    with tempfile.TemporaryDirectory() as place:
        given = ["--recipes", cell.recipe, "--scale-rules", cell.format]
        more = ["--tokens", str(tokens), "--out", str(Path(place) / "out")]
        return _seconds(["duquantpp_jax.cli", "compare", *given, *more])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32 * TARGETS)
    parser.add_argument("--separate", type=int, default=6, help="processes to time")
    parser.add_argument(
        "--recipes", type=int, default=len(RECIPES), help="of the grid, to shrink it"
    )
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    cells = [cell for cell in CELLS if cell.recipe in RECIPES[: given.recipes]]

    stride = max(1, len(cells) // given.separate)
    timed = cells[::stride][: given.separate]
    separate = [compare_seconds(cell, given.tokens) for cell in timed]
    each = sum(separate) / len(separate)
    print(
        f"{len(timed)} of {len(cells)} cells as separate compare processes: {each:.1f} s each "
        f"({min(separate):.1f} to {max(separate):.1f}), all {each * len(cells):.0f} s",
        flush=True,
    )
    whole = grid_seconds(cells, given.tokens, given.workers)
    ratio = each * len(cells) / whole
    print(f"{len(cells)} cells as a grid: {whole:.1f} s, {ratio:.1f} times faster", flush=True)
    half = [cell for cell in cells if cell.recipe in RECIPES[: max(2, given.recipes // 2)]]
    some, short = (
        grid_seconds(half, given.tokens, given.workers),
        grid_seconds(cells, given.tokens // 2, given.workers),
    )
    print(f"{len(half)} cells, {given.tokens:,} targets: {some:.1f} s", flush=True)
    print(f"{len(cells)} cells, {given.tokens // 2:,} targets: {short:.1f} s")
    cell = (whole - some) / max(len(cells) - len(half), 1)
    target = (whole - short) / (given.tokens / 2) / len(cells)
    print(f"a cell more {cell:.2f} s; 1,000 targets more {1000 * target:.2f} s a cell")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--grid"]:
        from duquantpp_jax.commands import ablate as command

        command.main(sys.modules[__name__], sys.argv[2:])
    main()
