"""How long does the command line take to answer, and for its main job?

Hypothesis: `--help`, and options that the parser refuses, take less than half a second of CPU time,
because nothing that computes is imported for them; `compare` on the embedded model takes less than
a minute of it, so 30 seconds on two idle cores, and about half where its programs were kept.

    python -m experiments.bench_start --compare --out experiments/results/bench_start.json

Each is run in processes of its own, answers RUNS times; the least of their user times counts,
because another process on the same core adds to it. Cost: seconds; with --compare a minute more.

Last result, 2026-11-29, jax 0.12, two cores that five other processes shared: answers in .19 to .30
s user, .03 s system; compare 42.8 + 3.5 s the first time, 26.1 + 2.9 s the next time.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from duquantpp_jax import files

RUNS = 5
CASES = {
    "duquantpp --help": ["--help"],
    "duquantpp compare --help": ["compare", "--help"],
    "an option that there is not": ["compare", "--recipez", "x"],
    "a number that is none": ["quantize", "--rows", "x"],
}


def seconds(arguments: list[str], runs: int, cache: str | None = None) -> dict[str, float]:
    """The least user and system time of a process with these arguments."""
    command = [sys.executable, "-m", "duquantpp_jax.cli", *arguments]
    environment = os.environ | ({} if cache is None else {"DUQUANTPP_CACHE": cache})
    times = []
    for _ in range(runs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=False, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append((after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime))
    user, system = min(times)
    return {"user_seconds": round(user, 3), "system_seconds": round(system, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {name: seconds(arguments, options.runs) for name, arguments in CASES.items()}
    if options.compare:
        with tempfile.TemporaryDirectory() as place:
            for name in ("compare, the first time", "compare, the next time"):
                found[name] = seconds(["compare", "--out", f"{place}/out"], 1, place)
    for name, times in found.items():
        print(
            f"{name:<30}{times['user_seconds']:>7.2f} s user{times['system_seconds']:>7.2f} s sys"
        )
    if options.out:
        result = {"python": sys.version.split()[0], "runs": options.runs, "cases": found}
        files.write_whole(options.out, json.dumps(result, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
