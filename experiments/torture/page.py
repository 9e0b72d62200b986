"""What is promised, how is it tried, and what came of it last? Writes docs/reliability.md.

Question: see above.
Hypothesis: nothing is lost, nothing trusted, and nothing plausible but wrong.
Command: python -m experiments.torture.page
Cost: a second; the numbers are those of experiments/results/torture_*.json.
Last result: docs/reliability.md, which a test holds to be what this writes.
"""

from pathlib import Path
from typing import Any

from experiments.torture.subjects import read_result

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
TEXT = """# Reliability

What is promised of files, of kills, of faults and under load; how each promise is tried; and the
last result. [SECURITY.md](../SECURITY.md) says who is trusted. `python -m experiments.torture.page`
writes this page from the results of

```sh
python -m experiments.torture.fuzz --seconds 600     # of CPU time
python -m experiments.torture.kills --seconds 600    # of the clock, as below
python -m experiments.torture.faults --seconds 300
python -m experiments.torture.load --seconds 300
```

Each prints its findings and ends with 1 if there are any. Models are tiny and random; moments and
mutations are drawn from a seed. Short forms are tests (`tests/test_torture.py`).

| promise | how it is tried | count | last result |
| --- | --- | ---: | --- |
{rows}

{dates}

## Readers

Inputs of each reader, and how many of them were refused; the others were read. Half of the inputs
and more stay valid JSON, or a file of their kind; of files that are sealed or hold a hash of their
contents half are sealed again, or the hash is believed, so that what lies behind it is tried.

| reader | inputs | refused |
| --- | ---: | ---: |
{readers}

Branches of the readers' files that a quarter of the inputs reached (coverage.py; the files also
write, and what writes is not run): {branches}.

## Held by tests

| promise | test |
| --- | --- |
{tests}

## Not promised

- A file that is cut short in place while it is read kills its reader (SIGBUS: files are mapped), as
  SIGKILL would; replaced by a rename it does not.
- `SHA256SUMS` and hashes find accidents and mixed-up files. They are no signatures.
- A chat template runs in a sandbox, without a bound on its time; Ctrl-C ends it. A packed text is
  unpacked whole, into memory.
- The same bytes are promised on one machine ([quantize.md](quantize.md)).
"""
TESTS = {
    "a quantized directory is read as a stranger's": "tests/commands/test_own_files.py",
    "what was written by half is not there": "tests/test_files.py",
    "signals, Ctrl-C and want of memory end a command in one line": "tests/test_stopping.py",
    "quantizing that is killed goes on": "tests/commands/test_resuming.py",
    "a grid that is killed goes on": "tests/lab/test_kills.py",
    "no claim outlives its process": "tests/lab/test_claims.py",
    "a lie in the header of a GGUF file is refused at once": "tests/checkpoints/test_gguf.py",
    "wrong requests are refused in the form of the interface": "tests/interop/test_application.py",
    "no command but `serve` asks for a network": "tests/conftest.py",
    "nothing is unpickled or evaluated, and no file imports": "tests/test_arrows.py",
}


def _verdict(found: list[str] | int) -> str:
    count = found if isinstance(found, int) else len(found)
    return "none" if count == 0 else f"**{count} findings**"


def _of(result: dict[str, Any], start: str) -> list[str]:
    return [line for line in result["findings"] if line.startswith(start)]


def page() -> str:
    """The page of the last results."""
    fuzz, kills, faults, load = map(read_result, ("fuzz", "kills", "faults", "load"))
    rows = [
        (
            "a reader gives a value or refuses in one line: no other exception, no hang, no burst "
            "of memory",
            f"`fuzz`: {len(fuzz['readers'])} readers on mutated files",
            f"{fuzz['inputs']:,} inputs",
            _verdict(fuzz["findings"]),
        )
    ]
    for name, each in kills["commands"].items():
        how = (
            "`kills`: SIGKILL while it starts and while it answers; the next answers the same"
            if name == "serve"
            else "`kills`: SIGKILL at random moments; then a run to the end is compared"
        )
        promise = "ends as if undisturbed after a kill, and nothing is left"
        count = f"{each['kills']} kills, {each['ends']} ends"
        rows.append((f"`{name}` {promise}", how, count, _verdict(_of(kills, f"{name}:"))))
    disk = "a tmpfs" if faults["how"] == "tmpfs" else "bounded files (RLIMIT_FSIZE)"
    hows = {
        "full disk": f"`faults`: {disk} that is smaller than the results; then with room",
        "read-only": f"`faults`: --out on {disk} that is read-only",
        "replaced": "`faults`: a file that is read is replaced by another of its kind",
        "removed": "`faults`: a file that is read is removed",
        "output removed": "`faults`: --out is removed while it is written",
    }
    for fault, how in hows.items():
        counts = [each[fault] for each in faults["commands"].values()]
        tried, felt = (sum(count[n] for count in counts) for n in ("tried", "felt"))
        wrong = [line for line in faults["findings"] if f", {fault}" in line]
        promise = f"{fault}: one line, or the result of an undisturbed run; never another"
        count = f"{tried} runs, {felt} felt it" if tried else "not tried"
        rows.append((promise, how, count, _verdict(wrong)))
    cells, several = load["cells"], load["processes"]
    memory = cells["mib"]
    rows.append(
        (
            "memory does not grow with cells",
            f"`load`: one process; MiB every 100 cells: {', '.join(map(str, memory))}",
            f"{cells['cells']:,} cells",
            _verdict(_of(load, "cells:")),
        )
    )
    rows.append(
        (
            "a cell is measured once, by however many processes",
            f"`load`: {several['processes']} processes on one directory",
            f"{several['cells']} cells",
            _verdict(_of(load, "processes:")),
        )
    )
    clients = load["clients"]
    rows.append(
        (
            "`serve` answers who asks well, or says 503 where too many wait",
            f"`load`: {clients['clients']} clients that are good, slow, huge, malformed or gone; "
            f"grown by {clients['grown_mib']} MiB",
            f"{clients['requests']:,} requests, {clients['refused_503']} times 503",
            _verdict(_of(load, "clients:")),
        )
    )
    results = {"fuzz": fuzz, "kills": kills, "faults": faults, "load": load}
    dates = "; ".join(f"`{name}` {result['date']}" for name, result in results.items())
    readers = [
        (name, f"{sum(counts.values()):,}", f"{counts.get('refused', 0):,}")
        for name, counts in fuzz["readers"].items()
    ]
    branches = [f"{name} {share}" for name, share in fuzz["coverage"].items()]
    return TEXT.format(
        rows=_table(rows),
        dates=f"Last runs: {dates}; findings of the last run, which are mended or named below.",
        readers=_table(readers),
        branches=", ".join(branches) or "not measured",
        tests=_table([(promise, f"[{test}](../{test})") for promise, test in TESTS.items()]),
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
