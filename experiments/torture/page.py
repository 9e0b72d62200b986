"""What is promised, how is it tried, and what came of it last? Writes docs/reliability.md.

Question: see above.
Hypothesis: nothing is lost, nothing trusted, and nothing plausible but wrong.
Command: python -m experiments.torture.page
Cost: a second; the numbers are those of experiments/results/torture_*.json.
Last result: docs/reliability.md, which a test holds to be what this writes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from duquantpp_jax import files
from experiments.torture.subjects import read_result

Row = tuple[str, ...]
"""A promise, how it is tried, the count, and the last result."""
PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
TEXT = """# Reliability

What is promised of files, of kills, of faults and under load; how each promise is tried; and the
findings of the last run. [SECURITY.md](../SECURITY.md) says who is trusted.
`python -m experiments.torture.page` writes this page from the results of

```sh
python -m experiments.torture.fuzz --seconds 600     # of CPU time
python -m experiments.torture.kills --seconds 900    # of the clock, as the next two
python -m experiments.torture.faults --seconds 300
python -m experiments.torture.load --seconds 300
python -m experiments.mutants                        # 40 minutes on two cores
```

Each prints its findings and ends with 1 if there are any. Models are tiny and random; moments and
mutations are drawn from a seed. Kills are 100 of a command at most, of `learn` and `serve` 20; the
count is what the time allowed. Short forms are tests: [below](#held-by-tests).

| promise | how it is tried | count | last result |
| --- | --- | ---: | --- |
{rows}

## Findings of the last runs

{findings}

What a run finds is mended, and the next run tells.

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
    "short form of `fuzz`": "tests/test_torture.py",
    "short form of `kills`, of `ablate`: a grid that is killed goes on": "tests/lab/test_kills.py",
    "of `quantize`, which goes on and exports": "tests/commands/test_resuming.py",
    "short form of `faults`": "tests/commands/test_faults.py",
    "short form of `load`: cells leave no arrays behind": "tests/lab/test_running.py",
    "processes share a grid, a killed one is replaced": "tests/lab/test_executors.py",
    "clients of `serve` that are slow, gone or wrong": "tests/interop/test_application.py",
    "what changes while it is read gives no result": "tests/commands/test_same_bytes.py",
    "a quantized directory is read as a stranger's": "tests/commands/test_own_files.py",
    "what was written by half is not there": "tests/test_files.py",
    "signals, Ctrl-C and want of memory end a command in one line": "tests/test_stopping.py",
    "no claim outlives its process": "tests/lab/test_claims.py",
    "a lie in the header of a GGUF file is refused at once": "tests/checkpoints/test_gguf.py",
    "no command but `serve` asks for a network": "tests/conftest.py",
    "nothing is unpickled or evaluated, and no file imports": "tests/test_arrows.py",
}


def _verdict(found: list[str]) -> str:
    return "none" if not found else f"**{len(found)}** (below)"


def _of(result: dict[str, Any], start: str) -> list[str]:
    return [line for line in result["findings"] if line.startswith(start)]


def _fuzz(result: dict[str, Any]) -> Iterator[Row]:
    yield (
        "a reader gives a value or refuses in one line: no other exception, no hang, no burst of "
        "memory",
        f"{len(result['readers'])} readers on mutated files",
        f"{result['inputs']:,} inputs",
        _verdict(result["findings"]),
    )


def _kills(result: dict[str, Any]) -> Iterator[Row]:
    for name, each in result["commands"].items():
        how = "SIGKILL at random moments; then a run to the end is compared"
        if name == "serve":
            how = "SIGKILL while it starts and while it answers; the next must answer the same"
        yield (
            f"`{name}` ends as if undisturbed after a kill, and nothing is left",
            how,
            f"{each['kills']} kills, {each['ends']} ends",
            _verdict(_of(result, f"{name}:")),
        )


def _faults(result: dict[str, Any]) -> Iterator[Row]:
    disk = "a tmpfs" if result["how"] == "tmpfs" else "bounded files (RLIMIT_FSIZE)"
    hows = {
        "full disk": f"{disk} that is smaller than the results; then with room",
        "read-only": f"--out on {disk} that is read-only",
        "replaced": "a file that is read is replaced by another of its kind",
        "removed": "a file that is read is removed",
        "output removed": "--out is taken away by a rename while it is written",
    }
    names = ", ".join(f"`{name}`" for name in result["commands"])
    for fault, how in hows.items():
        counts = [each[fault] for each in result["commands"].values()]
        new = ", of the old file or the new" if fault == "replaced" else ""
        tried, felt = (sum(count[n] for count in counts) for n in ("tried", "felt"))
        yield (
            f"{fault}: one line, or the result of an undisturbed run{new}; never another",
            f"{how}; {names}",
            f"{tried} runs, {felt} of them ended by it",
            _verdict([line for line in result["findings"] if f", {fault}" in line])
            if tried
            else "not tried: the time was over",
        )


def _load(result: dict[str, Any]) -> Iterator[Row]:
    cells, several, clients = (result[part] for part in ("cells", "processes", "clients"))
    yield (
        "memory does not grow with cells",
        f"one process; MiB every 100 cells: {', '.join(map(str, cells['mib']))}",
        f"{cells['cells']:,} cells",
        _verdict(_of(result, "cells:")),
    )
    yield (
        "a cell is measured once, by however many processes",
        f"{several['processes']} processes on one directory",
        f"{several['cells']} cells",
        _verdict(_of(result, "processes:")),
    )
    yield (
        "`serve` answers who asks well, or says 503 where too many wait",
        f"{clients['clients']} clients that are good, slow, huge, malformed or gone; grown by "
        f"{clients['grown_mib']} MiB",
        f"{clients['requests']:,} requests, {clients['refused_503']} times 503",
        _verdict(_of(result, "clients:")),
    )


def _planted(result: dict[str, Any]) -> Iterator[Row]:
    yield (
        "a test fails where the code is wrong",
        "`python -m experiments.mutants`: of the package one piece of text is changed, and the "
        "tests that are named beside it run",
        f"{result['tried']} of {result['planted']} errors",
        _verdict(result["findings"]),
    )


KINDS = {
    "fuzz": _fuzz,
    "kills": _kills,
    "faults": _faults,
    "load": _load,
    "planted": _planted,
}


def page() -> str:
    """The page of the last results; a kind that was not run yet has one row that says so."""
    rows: list[Row] = []
    for kind, described in KINDS.items():
        result = read_result(kind)
        if result is None:
            rows.append(("", f"`{kind}`", "", "not run at length yet"))
            continue
        dated = f"`{kind}`, {result['date']}"
        rows += [(promise, f"{dated}: {how}", *rest) for promise, how, *rest in described(result)]
    fuzz = read_result("fuzz") or {"readers": {}, "coverage": {}}
    readers = [
        (name, f"{sum(counts.values()):,}", f"{counts.get('refused', 0):,}")
        for name, counts in fuzz["readers"].items()
    ]
    branches = [f"{name} {share}" for name, share in fuzz["coverage"].items()]
    lines = [
        f"- `{kind}`: `{' '.join(files.printable(line).split())[:200]}`"
        for kind in KINDS
        for line in (read_result(kind) or {"findings": []})["findings"]
    ]
    return TEXT.format(
        rows=_table(rows),
        findings="\n".join(lines) or "None.",
        readers=_table(readers),
        branches=", ".join(branches) or "not measured",
        tests=_table([(promise, f"[{test}](../{test})") for promise, test in TESTS.items()]),
    )


def _table(rows: list[Row]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
