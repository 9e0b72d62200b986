"""Do the tests catch errors? Plants one at a time and runs the tests that should see it.

Question: is there an error of the kinds of `planted/` that the quick tests miss?
Hypothesis: none of those listed there.
Command: python -m experiments.mutants [--only NAME ...] [--jobs 2]
Cost: about 6 minutes on 2 cores for the formats, half an hour for the others.
Last result: results/torture_planted.json, and docs/reliability.md.

Outside of the formats 51 were listed before any test was touched (2026-11-29), and 12 of them
survived at first:

    a test that asked the code   WUSH's damping; held-out loss: the function under test computed
                                 both sides of the comparison
    inputs that hide it          rotate_quantize without waits for ring and accumulators, and with
                                 both warpgroups on the same tiles (a CTA had one tile; this was
                                 known); EVEN in Triton (no largest significand at its border);
                                 weights moved back (Hadamard matrices are their own inverses; a
                                 slow test saw it); a chat's special tokens (there were none)
    a change too large           a record's metrics (halved, not a percent off)
    no test of it                keys of sites; held-out rows of a checkpoint; rates by step

Each is caught by tests of its kind now. (Rates are optax's own since, and another error stands in
their place.) Two of scaled_matmul were added with those tests; one of them, on accumulators that do
not overlap, would have survived.

Each mutant is a copy of the package in a temporary directory in which one piece of text, found
exactly once, is replaced. The tests named beside it run against the copy, stop at the first
failure, and must fail; on a copy without any change they must pass.
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from experiments.planted import MUTANTS, Mutant
from experiments.torture.subjects import write_result

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "duquantpp_jax"
TIMEOUT = 1800  # seconds for the tests of a mutant, and for all without one


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


def caught(mutant: Mutant, cache: str) -> str:
    """The test that fails on the copy with the error planted; empty if none does."""
    with tempfile.TemporaryDirectory() as place:
        copy(pathlib.Path(place), mutant)
        return failing(place, mutant.tests, cache, "-x", "-k", mutant.only)


def failing(place: str, tests: str, cache: str, *more: str) -> str:
    """The first of these tests that fails on a copy; empty if none does.

    `cache` keeps compiled programs, most of which recur. Tests that hang count as failed.
    """
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-rfE", "-m", "not slow", *more]
    files = [f"tests/{name}.py" for name in sorted(set(tests.split()))]
    environment = {**os.environ, "PYTHONPATH": place, "PYTHONDONTWRITEBYTECODE": "1"}
    environment["DUQUANTPP_TEST_COMPILED"] = cache
    how = {"capture_output": True, "text": True, "timeout": TIMEOUT}
    try:
        command = [sys.executable, "-m", "pytest", *options, *files]
        run = subprocess.run(command, cwd=place, env=environment, **how)
    except subprocess.TimeoutExpired:
        return f"nothing: it takes more than {TIMEOUT} s"
    if run.returncode not in (0, 1):
        raise RuntimeError(f"pytest could not run:\n{run.stdout}\n{run.stderr}")
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    return found[1] if found else "a test" * run.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of mutants")
    parser.add_argument("--jobs", type=int, default=2, help="tests at a time")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only is None or m.name in options.only]
    missed = []
    with (
        tempfile.TemporaryDirectory() as cache,
        tempfile.TemporaryDirectory() as place,
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
    ):
        runs = {pool.submit(caught, m, cache): m for m in chosen}
        copy(pathlib.Path(place), None)
        unchanged = pool.submit(failing, place, " ".join(m.tests for m in chosen), cache)
        for run in concurrent.futures.as_completed(runs):
            name, test = runs[run].name, run.result()
            missed += [] if test else [name]
            print(f"{name}: caught by {test}" if test else f"{name}: MISSED", flush=True)
        if wrong := unchanged.result():
            sys.exit(f"without any planted error {wrong} fails: mend that first")
    if options.only is None:
        findings = [f"{name}: no test named beside it fails" for name in missed]
        write_result(
            "planted", {"tried": len(chosen), "planted": len(MUTANTS), "findings": findings}
        )
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught; without an error the tests pass")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
