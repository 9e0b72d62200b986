"""Markdown tables from results: `python -m experiments.tables [--beside] FILE [FILE ...]`.

With --beside FILEs are summaries of one grid, and the table is its short form; the README's is
  python -m experiments.tables --beside experiments/results/grid_rotations_testbed.json \\
    experiments/results/grid_rotations_gutenberg27m_128rows.json
A FILE is a results.json of `duquantpp compare`, or a list of them as experiments/rotations.py
writes it; or a summary of `duquantpp ablate`, whose tables are printed as they are. Where a recipe
has several seeds a cell is their mean, with the least and the largest. The difference to
block_hadamard is that of the first seed, with its 95 % interval.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from duquantpp_jax.lab import table as pivots


def cells(runs: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """All rows of a recipe under a rule, one for each seed."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        for row in run["rows"]:
            found.setdefault((row["recipe"], row["scale_rule"]), []).append(row)
    return {key: _distinct(rows) for key, rows in found.items()}


def _distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # The baseline is in every run, the same each time.
    return [row for i, row in enumerate(rows) if row not in rows[:i]]


def kl(rows: list[dict[str, Any]]) -> str:
    """KL of a cell, and the spread of its seeds."""
    values = [row["kl"] for row in rows]
    mean = f"{sum(values) / len(values):.4f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.4f}-{max(values):.4f})"


def difference(rows: list[dict[str, Any]]) -> str:
    """Paired difference to block_hadamard of the first seed, with half its interval's width."""
    row = rows[0]
    if not row["kl_difference_ci95"]:
        return ""
    low, high = row["kl_difference_ci95"]
    return f"{row['kl_difference']:+.4f} ± {(high - low) / 2:.4f}"


def table(runs: list[dict[str, Any]]) -> str:
    """Recipes down, scale rules across, each KL and its difference to block_hadamard."""
    found = cells(runs)
    rules = runs[0]["options"]["scale_rules"]
    lines = [
        "| recipe | " + " | ".join(f"{rule} | - block_hadamard" for rule in rules) + " |",
        "| --- |" + " ---: | ---: |" * len(rules),
    ]
    for recipe in runs[0]["options"]["recipes"]:
        row = [f"{kl(found[recipe, r])} | {difference(found[recipe, r])}" for r in rules]
        lines.append(f"| {recipe} | " + " | ".join(row) + " |")
    return "\n".join(lines)


SHORT = ("floor", "even", "log256")
"""Columns of the short form."""


def beside(all_pivots: list[dict[str, Any]]) -> str:
    """Rows of a grid down; a few columns of each model and text across; last, what a fit took on
    the first."""
    columns = [(one, c) for one in all_pivots for c in SHORT if c in one["columns"]]
    heads = [f"{one['model']} on {Path(one['text']).stem}, {column}" for one, column in columns]
    lines = [
        "| | " + " | ".join([*heads, "fit, s"]) + " |",
        "| --- |" + " ---: |" * (len(heads) + 1),
    ]
    for row in all_pivots[0]["rows"]:
        cells = [_short(one, row, column) for one, column in columns]
        cells.append(pivots.fit_seconds(all_pivots[0], row))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(pivot: dict[str, Any], row: str, column: str) -> str:
    """KL without the spread of its seeds, and its difference in brackets; nothing if not run."""
    found = [one for one in pivot["entries"] if (one["row"], one["column"]) == (row, column)]
    if not found:
        return ""
    said = pivots.difference(found[0])
    return f"{found[0]['kl']:.4f}" + (f" ({said})" if said else "")


def gains(pivot: dict[str, Any]) -> str:
    """Of a grid whose rows are the baseline and one method: columns down, both side by side."""
    baseline, method = pivot["baseline"], *(r for r in pivot["rows"] if r != pivot["baseline"])
    found = {(one["row"], one["column"]): one for one in pivot["entries"]}
    lines = [
        f"| | {baseline} | {method} | {method} - {baseline} | PPL, {baseline} | PPL, {method} |",
        "| --- |" + " ---: |" * 5,
    ]
    for column in pivot["columns"]:
        before, after = found[baseline, column], found[method, column]
        low, high = after["ci95"]
        parts = [f"{before['kl']:.4f}", f"{after['kl']:.4f}"]
        parts.append(f"{after['difference']:+.4f} ± {(high - low) / 2:.4f}")
        parts += [f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}"]
        lines.append(f"| {column} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def read(path: Path) -> list[dict[str, Any]]:
    """The runs in a file."""
    runs = json.loads(path.read_text(encoding="utf-8"))
    return runs if isinstance(runs, list) else [runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beside", action="store_true")
    parser.add_argument("files", type=Path, nargs="+")
    arguments = parser.parse_args()
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.files]
    if arguments.beside:
        print(beside([pivot for content in contents for pivot in content["tables"]]))
        return
    for path, content in zip(arguments.files, contents, strict=True):
        if "tables" in content:
            for pivot in content["tables"]:
                said = f"{pivots.title(pivot)}. {pivots.legend(pivot)}."
                print(f"\n{said}\n\n{pivots.markdown(pivot)}")
            continue
        runs = read(path)
        first = runs[0]
        print(
            f"\n{first['model']['name']}, {first['options']['text']['name']}, "
            f"{first['targets']:,} targets, float perplexity {first['float_perplexity']:.3f}, "
            f"seeds {', '.join(str(run['options']['seed']) for run in runs)}, "
            f"{first['environment']['device']}\n"
        )
        print(table(runs))


if __name__ == "__main__":
    main()
