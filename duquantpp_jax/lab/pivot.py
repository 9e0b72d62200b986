"""Pivots of records: KL and NLL of each entry, and its paired difference to a baseline row.

Every cell evaluates the same rows of text, so differences are taken row by row, always to the
baseline in the same column. Cells that differ in the seed alone are one entry, with their mean,
least and largest value. Intervals are over text, clustered by document, and over seeds
(evaluation/intervals.py); significant is what still is so after Holm's correction over the table.

A pivot is plain JSON, small enough to commit (docs/results.md explains its fields). lab/table.py
prints it.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Float

from duquantpp_jax.evaluation.intervals import Estimate, clusters, estimate, holm
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.lab.cells import Cell
from duquantpp_jax.lab.records import Record
from duquantpp_jax.lab.running import Outcome

Label = str | Callable[[Cell], str]
"""A field or property of Cell, or a function of the cell."""
Pivot = dict[str, Any]
Entry = dict[str, Any]

COMPARED = {"kl": "KL", "excess_nll": "excess NLL"}
"""Measures that have differences, and their headings; both in nats per token."""
MEASURES = (*COMPARED, "nll", "perplexity", "agreement", "sqnr_db")
"""Measures of an entry: each a mean over seeds, an interval and a range."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What gives a cell's row and column in a table, and the row that the others of a column are
    compared with."""

    rows: Label = "row"
    columns: Label = "format_label"
    baseline: str | None = None

    def place(self, cell: Cell) -> tuple[str, str]:
        """The cell's row and column."""
        labels = (self.rows, self.columns)
        row, column = (str(getattr(cell, n)) if isinstance(n, str) else n(cell) for n in labels)
        return row, column


def pivots(outcome: Outcome, layout: Layout) -> list[Pivot]:
    """A pivot for each model and evaluation text of the grid.

    Raises:
      ValueError: Two cells have the same place and seed, or no row has the baseline's name.
    """
    subjects: dict[Any, list[Cell]] = {}
    for cell in [*outcome.records, *outcome.errors]:
        subjects.setdefault((cell.model, cell.text, cell.tokens), []).append(cell)
    return [_pivot(cells, outcome, layout) for cells in subjects.values()]


def _pivot(cells: list[Cell], outcome: Outcome, layout: Layout) -> Pivot:
    measured: dict[tuple[str, str], list[Record]] = {}
    failed, seeds = [], set()
    for cell in cells:
        row, column = place = layout.place(cell)
        if (place, cell.seed) in seeds:
            raise ValueError(
                f"two cells stand in row {row}, column {column} and do not differ in the seed: "
                "give ROWS or COLUMNS that tell them apart"
            )
        seeds.add((place, cell.seed))
        if cell in outcome.records:
            measured.setdefault(place, []).append(outcome.records[cell])
        else:
            about = {"row": row, "column": column, "seed": cell.seed}
            failed.append(about | {"error": outcome.errors[cell]})
    rows, columns = (list(dict.fromkeys(n)) for n in zip(*map(layout.place, cells), strict=True))
    if (baseline := layout.baseline) is not None and baseline not in rows:
        raise ValueError(
            f"the baseline {baseline} is no row of the table: choose one of {', '.join(rows)}"
        )
    every = [record for records in measured.values() for record in records]
    environments = distinct(record["environment"] for record in every)
    ordered = [(row, column) for column in columns for row in rows if (row, column) in measured]
    entries = [
        _entry(place, measured[place], environments)
        | {"difference": _difference(place, measured, layout.baseline)}
        for place in ordered
    ]
    for measure in COMPARED:
        differences = [entry["difference"][measure] for entry in entries if entry["difference"]]
        tested = [found for found in differences if found["p"] is not None]
        for found, p in zip(tested, holm([found["p"] for found in tested]), strict=True):
            found["significant"] = p <= 0.05
    return {
        **_subject(every),
        "rows": rows,
        "columns": columns,
        "baseline": layout.baseline,
        "corrected_over": "table",
        "entries": entries,
        "failed": failed,
        "environments": environments,
    }


def _subject(every: list[Record]) -> dict[str, Any]:
    if not every:
        return dict.fromkeys(("model", "text", "targets", "float_perplexity", "clusters"))
    first = every[0]
    names, hashes = first["subject"], first["configuration"]
    unit, numbers = clusters(np.asarray(first["rows"]["document"]))
    return {
        "model": {"name": names["model"], "sha256": hashes["model"]},
        "text": {"name": names["text"], "sha256": hashes["text"]},
        "targets": first["metrics"]["targets"],
        "float_perplexity": first["metrics"]["float_perplexity"],
        "clusters": {"unit": unit, "count": len(np.unique(numbers))},
    }


def _entry(
    place: tuple[str, str], records: list[Record], environments: list[dict[str, Any]]
) -> Entry:
    first, measures = records[0], {}
    known = {measure: _estimate(measure, records) for measure in COMPARED}
    for name in MEASURES:
        if None not in (values := [record["metrics"].get(name) for record in records]):
            ci95 = known[name].ci95 if name in known else None
            bounds = [min(values), max(values)]
            measures[name] = {"value": float(np.mean(values)), "ci95": ci95, "range": bounds}
    return {
        "row": place[0],
        "column": place[1],
        "seeds": [record["cell"]["seed"] for record in records],
        "draws": first["cell"]["draws"],
        **measures,
        **({"online": first["online"]} if "online" in first else {}),
        "interval": known["kl"].sources,
        "environments": sorted({environments.index(r["environment"]) for r in records}),
        "fit_seconds": min(record["seconds"]["fit"] for record in records),
        "seconds": sum(record["seconds"]["total"] for record in records),
    }


def _difference(
    place: tuple[str, str], found: dict[tuple[str, str], list[Record]], baseline: str | None
) -> dict[str, Any] | None:
    """Difference of each measure to the column's baseline; None for the baseline, or without it."""
    base = found.get((str(baseline), place[1]))
    if base is None or place[0] == baseline:
        return None
    estimates = {measure: _estimate(measure, found[place], base) for measure in COMPARED}
    return {"interval": estimates["kl"].sources} | {
        measure: {"value": found.mean, "ci95": found.ci95, "p": found.p, "significant": None}
        for measure, found in estimates.items()
    }


def _estimate(measure: str, records: list[Record], base: list[Record] | None = None) -> Estimate:
    _, cluster = clusters(np.asarray(records[0]["rows"]["document"]))
    comparator = None if base is None else _by_seed(measure, base)
    return estimate(_by_seed(measure, records), cluster, comparator)


def _by_seed(measure: str, records: list[Record]) -> dict[int, Float[np.ndarray, " rows"]]:
    """The measure of each seed on each row of text, in nats per token."""
    found = {}
    for record in records:
        rows = record["rows"]
        sums = rows["kl"] if measure == "kl" else np.subtract(rows["nll"], rows["float_nll"])
        found[record["cell"]["seed"]] = np.asarray(sums) / TARGETS
    return found


def distinct(values: Iterable[Any]) -> list[Any]:
    """The values without repetitions, in order. They need not be hashable."""
    found = list(values)
    return [value for i, value in enumerate(found) if value not in found[:i]]
