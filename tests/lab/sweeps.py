"""Sweeps that are killed: `python -m tests.lab.sweeps MODEL TEXT PLACE KILLS SEED`.

This process imports everything and starts no JAX backend, so that it can fork sweeps that begin at
once. Each round forks two on the same directory and kills both: at a random moment of the time that
a first cell takes, or within milliseconds of the next claim, or of the next record, where little
time is spent and most could go wrong. At the end one more runs to its end. Prints what it saw as
JSON; tests/lab/test_kills.py judges it.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.lab import Cell, records, running


def grid(model: Path, text: Path) -> list[Cell]:
    """Cells that share their programs, and take few: each turns the float model another way."""
    given = {"tokens": TARGETS, "rotate_stream": "random_hadamard"}
    given |= {"model": model, "text": text, "calibration_text": text}
    return [Cell("turned", "float", seed=seed, **given) for seed in range(16)]


def sweep(cells: list[Cell], out: Path, log: Path) -> int:
    """Forks a sweep that logs each cell it has recorded; its process."""
    if pid := os.fork():
        return pid
    write = records.write

    def logged(out: Path, cell: Cell, found) -> None:
        write(out, cell, found)
        with log.open("a") as file:
            file.write(f"{cell.digest}\n")

    records.write = logged
    failed = 1
    try:
        failed = int(bool(running.run(cells, out).errors))
    finally:
        os._exit(failed)


def wait_for_more(place: Path, pattern: str, seconds: float = 120) -> bool:
    """Waits for a file that is not there now; whether it came in time."""
    before, deadline = set(place.glob(pattern)), time.monotonic() + seconds
    while set(place.glob(pattern)) <= before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


def inodes(out: Path) -> dict[str, tuple[int, int]]:
    """Which file each record is: one that is written again is another."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.glob("*.json")}


def main() -> None:
    model, text, place = map(Path, sys.argv[1:4])
    kills, chance = int(sys.argv[4]), random.Random(int(sys.argv[5]))
    cells, log = grid(model, text), place / "log"
    (place / "killed").mkdir()
    undisturbed, out = place / "undisturbed", place / "killed"
    for name, some in (("compiling", cells[:1]), ("undisturbed", cells)):
        began = time.time()
        _, status = os.waitpid(sweep(some, place / name, place / f"log.{name}"), 0)
        assert status == 0
    first = min(path.stat().st_mtime for path in undisturbed.glob("*.json")) - began
    seen = {"held": [], "rewritten": 0, "done": []}
    for number in range(kills):
        files = inodes(out)
        pids = [sweep(cells, out, log) for _ in range(2)]
        match number % 3:
            case 0:  # not beyond a record: a machine that got faster must not finish the grid
                wait_for_more(out, "*.json", chance.uniform(0, 1.5 * first))
            case 1:
                assert wait_for_more(out / running.CLAIMS, "*"), "no new claim"
                time.sleep(chance.uniform(0, 0.02))
            case 2:
                assert wait_for_more(out, "*.json"), "no new record"
                time.sleep(chance.uniform(0, 0.02))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        now = inodes(out)
        seen["rewritten"] += sum(now[name] != inode for name, inode in files.items())
        seen["held"].append(len(list((out / running.CLAIMS).glob("*"))))
        seen["done"].append(len(now))
    _, status = os.waitpid(sweep(cells, out, log), 0)
    print(json.dumps(seen | {"status": status}))


if __name__ == "__main__":
    main()
