"""Do the tests of the formats catch errors? Plants an error at a time and runs them.

Question: is there an error in the formats that their quick tests miss?
Hypothesis: none of those listed here.
Command: python -m experiments.mutants [--only NAME ...] [--jobs 2]
Cost: about 6 minutes on 2 cores.
Last result, 2026-11-25: all 60 caught (jax 0.12.0.1, Python 3.12).

Each mutant is a copy of the package in a temporary directory in which one piece of text, found
exactly once, is replaced. The tests named beside it run against the copy, stop at the first
failure, and must fail; on a copy without any change they must pass.
"""

import argparse
import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from experiments.planted import MUTANTS, Mutant

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "duquantpp_jax"
TIMEOUT = 900  # seconds for the tests of one mutant


def copy(into: pathlib.Path, mutant: Mutant | None) -> None:
    """The package and its tests in `into`, with the error planted.

    Raises:
      ValueError: The text to replace is not there exactly once.
    """
    ignore = shutil.ignore_patterns("__pycache__")
    for name in (PACKAGE, "tests", "experiments", "docs"):
        shutil.copytree(ROOT / name, into / name, ignore=ignore)
    for name in ("pyproject.toml", "LICENSE", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, into)
    if mutant is None:
        return
    path = into / PACKAGE / mutant.file
    text = path.read_text()
    if text.count(mutant.right) != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.right!r} is {text.count(mutant.right)} times in {mutant.file}"
        )
    path.write_text(text.replace(mutant.right, mutant.wrong))


def caught(mutant: Mutant, cache: str, *, planted: bool = True) -> bool:
    """Whether its tests fail on the copy, `planted` or, to see that they pass, without the error.

    `cache` keeps compiled programs, most of which recur.
    """
    with tempfile.TemporaryDirectory() as place:
        copy(pathlib.Path(place), mutant if planted else None)
        files = [f"tests/{name}.py" for name in mutant.tests.split()]
        options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", mutant.only]
        options += ["-m", "" if mutant.slow else "not slow"]
        environment = {
            **os.environ,
            "PYTHONPATH": place,
            "PYTHONDONTWRITEBYTECODE": "1",
            "DUQUANTPP_TEST_COMPILED": cache,
        }
        command = [sys.executable, "-m", "pytest", *options, *files]
        how = {"capture_output": True, "text": True, "timeout": TIMEOUT}
        try:
            run = subprocess.run(command, cwd=place, env=environment, **how)
        except subprocess.TimeoutExpired:  # whoever waits for the tests sees it
            return True
        if run.returncode not in (0, 1):
            raise RuntimeError(f"pytest could not run:\n{run.stdout}\n{run.stderr}")
        return run.returncode == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of mutants")
    parser.add_argument("--jobs", type=int, default=2, help="tests at a time")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only is None or m.name in options.only]
    # Each choice of tests once, without an error.
    plain = {(m.tests, m.only, m.slow): m for m in chosen}.values()
    missed = []
    with (
        tempfile.TemporaryDirectory() as cache,
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
    ):
        unchanged = {pool.submit(caught, m, cache, planted=False): m for m in plain}
        runs = {pool.submit(caught, m, cache): m for m in chosen}
        for run in concurrent.futures.as_completed(runs):
            seen = run.result()
            missed += [] if seen else [runs[run].name]
            print("caught " if seen else "MISSED ", runs[run].name, flush=True)
        if failing := [m.tests for run, m in unchanged.items() if run.result()]:
            sys.exit(f"without any planted error tests fail: mend {', '.join(failing)} first")
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught; without an error the tests pass")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
