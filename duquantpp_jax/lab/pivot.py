"""Pivots of records: KL and NLL of every cell, with paired differences to a baseline row.

A row of text is seen by every cell, so differences are taken row by row, always to the baseline of
the same column. Cells that differ in the seed alone are one entry: their mean, with the least and
the largest beside it. The 95 % interval of a difference is over text, clustered by document, and
over seeds (evaluation/intervals.py); what Holm's correction over all differences that the table
shows still calls significant at 5 % carries a star.

A pivot is a plain JSON value, small enough to commit (docs/results.md says what each name means);
lab/table.py shows it.
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
"""Measures that have differences, in the words of tables; both in nats per token."""
MEASURES = (*COMPARED, "nll", "perplexity", "agreement", "sqnr_db")
"""What an entry may hold, each as its mean over seeds, its interval and its range."""


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
    every = [record for records in found.values() for record in records]
    environments = distinct(record["environment"] for record in every)
    entries = [
        _entry(place, records, environments)
        | {"difference": _difference(place, found, layout.baseline)}
        for place, records in sorted(
            found.items(), key=lambda item: (columns.index(item[0][1]), rows.index(item[0][0]))
        )
    ]
    for measure in COMPARED:
        judge([entry["difference"][measure] for entry in entries if entry["difference"]])
    return {
        **_subject(every),
        "rows": rows,
        "columns": columns,
        "baseline": layout.baseline,
        "corrected_over": "table",
        "entries": entries,
        "failed": [
            {"row": place[0], "column": place[1], "seed": seed, "error": outcome.errors[cell]}
            for place, there in places.items()
            for seed, cell in there.items()
            if cell in outcome.errors
        ],
        "environments": environments,
    }


def _subject(every: list[Record]) -> dict[str, Any]:
    if not every:
        nothing = ("model", "text", "targets", "float_perplexity", "clusters")
        return dict.fromkeys(nothing)
    first = every[0]
    unit, numbers = clusters(np.asarray(first["rows"]["document"]))
    return {
        **{
            name: {"name": first["subject"][name], "sha256": first["configuration"][name]}
            for name in ("model", "text")
        },
        "targets": first["metrics"]["targets"],
        "float_perplexity": first["metrics"]["float_perplexity"],
        "clusters": {"unit": unit, "count": len(np.unique(numbers))},
    }


def _entry(
    place: tuple[str, str], records: list[Record], environments: list[dict[str, Any]]
) -> Entry:
    means = {name: [r["metrics"].get(name) for r in records] for name in MEASURES}
    known = {measure: _estimate(measure, records) for measure in COMPARED}
    return {
        "row": place[0],
        "column": place[1],
        "seeds": [record["cell"]["seed"] for record in records],
        "draws": records[0]["cell"]["draws"],
        **{
            name: {
                "value": float(np.mean(values)),
                "ci95": known[name].ci95 if name in known else None,
                "range": [min(values), max(values)],
            }
            for name, values in means.items()
            if None not in values
        },
        **({"online": records[0]["online"]} if "online" in records[0] else {}),
        "interval": known["kl"].sources,
        "environments": sorted({environments.index(r["environment"]) for r in records}),
        "fit_seconds": min(record["seconds"]["fit"] for record in records),
        "seconds": sum(record["seconds"]["total"] for record in records),
    }


def _difference(
    place: tuple[str, str], found: dict[tuple[str, str], list[Record]], baseline: str | None
) -> dict[str, Any] | None:
    """Of each measure, to the baseline of the column; None where there is nothing to compare."""
    base = found.get((str(baseline), place[1]))
    if base is None or place[0] == baseline:
        return None
    estimates = {measure: _estimate(measure, found[place], base) for measure in COMPARED}
    return {"interval": estimates["kl"].sources} | {
        measure: {"value": one.mean, "ci95": one.ci95, "p": one.p, "significant": None}
        for measure, one in estimates.items()
    }


def _estimate(measure: str, records: list[Record], base: list[Record] | None = None) -> Estimate:
    _, cluster = clusters(np.asarray(records[0]["rows"]["document"]))
    comparator = None if base is None else _by_seed(measure, base)
    return estimate(_by_seed(measure, records), cluster, comparator)


def _by_seed(measure: str, records: list[Record]) -> dict[int, Float[np.ndarray, " rows"]]:
    """The measure on each row of text, in nats per token."""

    def of(rows: dict[str, Any]) -> Float[np.ndarray, " rows"]:
        if measure == "kl":
            return np.asarray(rows["kl"])
        return np.asarray(rows["nll"]) - np.asarray(rows["float_nll"])

    return {record["cell"]["seed"]: of(record["rows"]) / TARGETS for record in records}


def judge(differences: list[dict[str, Any]]) -> None:
    """Says of each difference whether it is significant when all are judged together."""
    judged = [one for one in differences if one["p"] is not None]
    for one, p in zip(judged, holm([one["p"] for one in judged]), strict=True):
        one["significant"] = p <= 0.05


def distinct(values: Iterable[Any]) -> list[Any]:
    """The values without repetitions, in their order."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
