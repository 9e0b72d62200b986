"""Markdown tables from results: `python -m experiments.tables [--beside] FILE [FILE ...]`.

With --beside FILEs are summaries of one grid, and the table is its short form. --rows and --columns
leave out all others; the README's table is
  python -m experiments.tables experiments/results/grid_headline_smollm2_128rows.json \\
    --columns "rtn, floor" "rtn, even" "gptq, even" \\
    --rows rtn block_hadamard smooth_hadamard duquantpp wush
A FILE is a results.json of `duquantpp compare` or a summary of `duquantpp ablate`; both hold pivots
(docs/results.md).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from duquantpp_jax.lab import table
from duquantpp_jax.lab.pivot import COMPARED, Pivot

SHORT = ("floor", "even", "log256")
"""Columns of the short form."""


def beside(pivots: list[Pivot]) -> str:
    """A row for each row of the grid, a few columns for each model and text, and the seconds of a
    fit on the first of them."""
    columns = [(pivot, c) for pivot in pivots for c in SHORT if c in pivot["columns"]]
    heads = [
        f"{pivot['model']['name']} on {Path(pivot['text']['name']).stem}, {column}"
        for pivot, column in columns
    ]
    lines = [
        "| | " + " | ".join([*heads, "fit, s"]) + " |",
        "| --- |" + " ---: |" * (len(heads) + 1),
    ]
    for row in pivots[0]["rows"]:
        cells = [_short(pivot, row, column) for pivot, column in columns]
        cells.append(table.fit_seconds(pivots[0], row))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(pivot: Pivot, row: str, column: str) -> str:
    """KL without the range of its seeds, and its difference in brackets; empty if not run."""
    found = [e for e in pivot["entries"] if (e["row"], e["column"]) == (row, column)]
    if not found:
        return ""
    said = table.difference(found[0])
    return f"{found[0]['kl']['value']:.4f}" + (f" ({said})" if said else "")


def chosen(pivot: Pivot, rows: Sequence[str], columns: Sequence[str]) -> Pivot:
    """Some rows and columns of a pivot, without times; differences stay corrected over all."""
    entries = [
        {name: value for name, value in entry.items() if name != "fit_seconds"}
        for entry in pivot["entries"]
        if entry["row"] in rows and entry["column"] in columns
    ]
    return pivot | {"rows": list(rows), "columns": list(columns), "entries": entries}


def gains(pivot: Pivot) -> str:
    """A line for each column of a grid whose rows are the baseline and one other method."""
    baseline, method = pivot["baseline"], *(r for r in pivot["rows"] if r != pivot["baseline"])
    found = {(entry["row"], entry["column"]): entry for entry in pivot["entries"]}
    lines = [
        f"| | {baseline} | {method} | {method} - {baseline} | PPL, {baseline} | PPL, {method} |",
        "| --- |" + " ---: |" * 5,
    ]
    for column in pivot["columns"]:
        before, after = found[baseline, column], found[method, column]
        parts = [f"{entry['kl']['value']:.4f}" for entry in (before, after)]
        parts.append(table.difference(after).rstrip("*"))
        parts += [f"{entry['perplexity']['value']:.2f}" for entry in (before, after)]
        lines.append(f"| {column} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def read(path: Path) -> list[Pivot]:
    """The pivots in a file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content.get("tables", [content])


def long(pivot: Pivot) -> str:
    """A pivot as it is: its title and legend, and a table of KL; of NLL too where it has
    differences."""
    parts = [f"{table.title(pivot)}. {table.legend(pivot)}."]
    for measure in COMPARED:
        differences = [entry["difference"] or {} for entry in pivot["entries"]]
        if measure == "kl" or any(measure in found for found in differences):
            parts.append(table.markdown(pivot, measure))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--rows", nargs="+")
    parser.add_argument("--columns", nargs="+")
    arguments = parser.parse_args()
    pivots = [pivot for path in arguments.files for pivot in read(path)]
    if arguments.beside:
        print(beside(pivots))
        return
    for pivot in pivots:
        if arguments.rows or arguments.columns:
            rows, columns = arguments.rows or pivot["rows"], arguments.columns or pivot["columns"]
            pivot = chosen(pivot, rows, columns)
        print(f"\n{long(pivot)}")


if __name__ == "__main__":
    main()
