"""Tables from records: a pivot of KL with paired differences to a baseline row.

A row of text is seen by every cell, so differences are taken row by row. Cells that differ in the
seed alone are one entry: their mean, with the least and the largest beside it. The 95 % interval of
a difference is over text, clustered by document, and over seeds (evaluation/intervals.py); what
Holm's correction over all rows of the column still calls significant at 5 % carries a star.

A pivot is a plain JSON value, small enough to commit; the forms it is shown in are made of it.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Float
from rich import box
from rich.table import Table

from duquantpp_jax.evaluation.intervals import clusters, estimate, holm
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.lab.cells import Cell
from duquantpp_jax.lab.records import Record
from duquantpp_jax.lab.running import Outcome

Label = str | Callable[[Cell], str]
"""A field or property of Cell, or a function of the cell."""
Pivot = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where cells stand in a table.

    Attributes:
      rows, columns: What names a cell's row and its column.
      baseline: The row that the others of a column are compared with.
    """

    rows: Label = "recipe"
    columns: Label = "format_label"
    baseline: str | None = None

    def place(self, cell: Cell) -> tuple[str, str]:
        """The cell's row and column."""
        row, column = (
            str(getattr(cell, label)) if isinstance(label, str) else label(cell)
            for label in (self.rows, self.columns)
        )
        return row, column


def pivots(outcome: Outcome, layout: Layout) -> list[Pivot]:
    """A pivot for each model and evaluation text of the grid.

    Raises:
      ValueError: Two cells stand in one place and do not differ in the seed; or the baseline is
        the name of no row.
    """
    subjects: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in [*outcome.records, *outcome.errors]:
        subjects.setdefault((cell.model, cell.text, cell.tokens), []).append(cell)
    return [_pivot(cells, outcome, layout) for cells in subjects.values()]


def _pivot(cells: list[Cell], outcome: Outcome, layout: Layout) -> Pivot:
    places: dict[tuple[str, str], dict[int, Cell]] = {}
    for cell in cells:
        there = places.setdefault(layout.place(cell), {})
        if cell.seed in there:
            raise ValueError(
                f"two cells stand in row {layout.place(cell)[0]}, column {layout.place(cell)[1]} "
                "and do not differ in the seed: give ROWS or COLUMNS that tell them apart"
            )
        there[cell.seed] = cell
    rows, columns = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))
    if layout.baseline is not None and layout.baseline not in rows:
        raise ValueError(
            f"the baseline {layout.baseline} is no row of the table: choose one of "
            f"{', '.join(rows)}"
        )
    found = {
        place: records
        for place, there in places.items()
        if (records := [outcome.records[c] for c in there.values() if c in outcome.records])
    }
    entries = [
        _entry(place, records, found.get((str(layout.baseline), place[1])), layout.baseline)
        for place, records in sorted(
            found.items(), key=lambda item: (columns.index(item[0][1]), rows.index(item[0][0]))
        )
    ]
    for column in columns:
        _correct([one for one in entries if one["column"] == column])
    every = [record for records in found.values() for record in records]
    return {
        **_subject(every),
        "rows": rows,
        "columns": columns,
        "baseline": layout.baseline,
        "entries": entries,
        "failed": [
            {"row": place[0], "column": place[1], "seed": seed, "error": outcome.errors[cell]}
            for place, there in places.items()
            for seed, cell in there.items()
            if cell in outcome.errors
        ],
        "environments": distinct(record["environment"] for record in every),
    }


def _subject(every: list[Record]) -> dict[str, Any]:
    if not every:
        return {"model": "", "text": "", "targets": 0, "float_perplexity": None, "clusters": None}
    first = every[0]
    unit, numbers = clusters(np.asarray(first["rows"]["document"]))
    return {
        "model": first["subject"]["model"],
        "text": first["subject"]["text"],
        "targets": first["metrics"]["targets"],
        "float_perplexity": first["metrics"]["float_perplexity"],
        "clusters": [unit, len(np.unique(numbers))],
    }


def _entry(
    place: tuple[str, str],
    records: list[Record],
    base: list[Record] | None,
    baseline: str | None,
) -> dict[str, Any]:
    kl = [record["metrics"]["kl"] for record in records]
    entry = {
        "row": place[0],
        "column": place[1],
        "seeds": [record["cell"]["seed"] for record in records],
        "kl": float(np.mean(kl)),
        "kl_range": [min(kl), max(kl)],
        "difference": None,
        "ci95": None,
        "p": None,
        "significant": None,
        **{
            name: None if None in values else float(np.mean(values))
            for name in ("excess_nll", "perplexity", "sqnr_db")
            for values in [[record["metrics"][name] for record in records]]
        },
        "fit_seconds": min(record["seconds"]["fit"] for record in records),
        "seconds": sum(record["seconds"]["total"] for record in records),
    }
    if base is not None and place[0] != baseline:
        _, cluster = clusters(np.asarray(records[0]["rows"]["document"]))
        found = estimate(_by_seed(records), cluster, _by_seed(base))
        entry |= {"difference": found.mean, "ci95": found.ci95, "p": found.p}
    return entry


def _by_seed(records: list[Record]) -> dict[int, Float[np.ndarray, " rows"]]:
    """KL of each row of text in nats per token."""
    return {one["cell"]["seed"]: np.asarray(one["rows"]["kl"]) / TARGETS for one in records}


def _correct(column: list[dict[str, Any]]) -> None:
    judged = [entry for entry in column if entry["p"] is not None]
    for entry, p in zip(judged, holm([entry["p"] for entry in judged]), strict=True):
        entry["significant"] = p <= 0.05


def distinct(values: Iterable[Any]) -> list[Any]:
    """The values without repetitions, in their order."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def title(pivot: Pivot) -> str:
    """What a table is of, in one line."""
    if not pivot["entries"]:
        return "no cell is finished"
    return (
        f"{pivot['model']}, {pivot['text']}, {pivot['targets']:,} targets, float perplexity "
        f"{pivot['float_perplexity']:.3f}"
    )


def legend(pivot: Pivot) -> str:
    """How to read a table, in one line."""
    said = "KL(float || quantized) in nats per token, mean over seeds (least-largest)"
    if pivot["baseline"] is None or pivot["clusters"] is None:
        return said
    unit, count = pivot["clusters"]
    return (
        f"{said}; paired difference to {pivot['baseline']} with half its 95 % interval, clustered "
        f"by {unit} ({count}); * significant after Holm's correction over the column"
    )


def kl(entry: dict[str, Any]) -> str:
    """KL of an entry, and the spread of its seeds."""
    if len(entry["seeds"]) == 1:
        return f"{entry['kl']:.4f}"
    return f"{entry['kl']:.4f} ({entry['kl_range'][0]:.4f}-{entry['kl_range'][1]:.4f})"


def difference(entry: dict[str, Any]) -> str:
    """The paired difference of an entry, with half its interval and its star."""
    if entry["difference"] is None:
        return ""
    said = f"{entry['difference']:+.4f}"
    if entry["ci95"] is not None:
        low, high = entry["ci95"]
        said += f" ± {(high - low) / 2:.4f}"
    return said + ("*" if entry["significant"] else "")


def fit_seconds(pivot: Pivot, row: str) -> str:
    """Of the row's fastest fit, compiling included where all its cells share one; nothing where no
    cell is finished, or in summaries that were written without."""
    there = [one for one in pivot["entries"] if one["row"] == row]
    seconds = [one["fit_seconds"] for one in there if "fit_seconds" in one]
    return f"{min(seconds):.1f}" if seconds else ""


def terminal(pivot: Pivot) -> Table:
    """The pivot for a terminal: KL, and the difference below it."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in pivot["columns"]:
        table.add_column(column, justify="right", no_wrap=True)
    entries = {(one["row"], one["column"]): one for one in pivot["entries"]}
    for row in pivot["rows"]:
        there = [entries.get((row, column)) for column in pivot["columns"]]
        table.add_row(row, *(f"{kl(e)}\n{difference(e)}".strip() if e else "" for e in there))
    return table


def markdown(pivot: Pivot) -> str:
    """The pivot as a Markdown table: each column's KL and differences side by side, and last
    `fit_seconds` where a summary has them."""
    beside = f"- {pivot['baseline']}"
    heads = [head for column in pivot["columns"] for head in (column, beside)]
    timed = any("fit_seconds" in one for one in pivot["entries"])
    heads += ["fit, s"] * timed
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    entries = {(one["row"], one["column"]): one for one in pivot["entries"]}
    for row in pivot["rows"]:
        there = [entries.get((row, column)) for column in pivot["columns"]]
        cells = [text for e in there for text in ((kl(e), difference(e)) if e else ("", ""))]
        cells += [fit_seconds(pivot, row)] * timed
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
