"""Self-contained HTML pages: sortable tables, figures, configurations, versions."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from duquantpp_jax.lab import table
from duquantpp_jax.lab.pivot import Entry, Pivot, distinct
from duquantpp_jax.lab.running import Outcome

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 68em; padding: 0 1em;
       color: #222; }
h1 { font-size: 1.4em } h2 { font-size: 1.15em; margin-top: 2em }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .8em; font-size: 12px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
.wide { overflow-x: auto }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd;
         white-space: nowrap; }
.text { text-align: left }
th { cursor: pointer; border-bottom: 2px solid #444 } th:hover { background: #eef }
tr.baseline td { background: #f3f3f3 } .failed { color: #a00 }
svg, img { max-width: 100%; height: auto }
"""

# A click on a heading sorts by its column: by number where the cell has one, else by text.
_SCRIPT = """
document.querySelectorAll("th").forEach(th => th.addEventListener("click", () => {
  const body = th.closest("table").tBodies[0], i = th.cellIndex;
  const up = th.dataset.up = th.dataset.up === "1" ? "0" : "1";
  const value = tr => tr.cells[i].dataset.value ?? tr.cells[i].textContent;
  const order = (a, b) => isNaN(a) || isNaN(b) || a === "" || b === "" ?
    String(a).localeCompare(String(b)) : a - b;
  [...body.rows].sort((a, b) => (up === "1" ? 1 : -1) * order(value(a), value(b)))
    .forEach(tr => body.append(tr));
}));
"""


Cells = Sequence[tuple[str, float | int | None, str]]
"""Heading, number to sort by (None to sort by the text) and text of each cell of a line."""


def page(name: str, about: str, sections: Iterable[str], details: Mapping[str, Any]) -> str:
    """The HTML of a page that needs no other file.

    Args:
      about: What is shown, in a few lines of text.
      sections: HTML, such as `section`, `sortable` and `image` give.
      details: By heading what is shown folded, as JSON.
    """
    folded = [
        f"<details><summary>{escape(heading)}</summary>"
        f"<pre>{escape(json.dumps(value, indent=1))}</pre></details>"
        for heading, value in details.items()
    ]
    return "".join(
        [
            f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{escape(name)}</title>",
            f"<style>{_STYLE}</style><h1>{escape(name)}</h1><pre>{escape(about)}</pre>",
            *sections,
            "<h2>Configuration</h2>",
            *folded,
            f"<script>{_SCRIPT}</script></html>\n",
        ]
    )


def webpage(name: str, about: str, pivots: list[Pivot], outcome: Outcome) -> str:
    """The page of a grid; `about` is its question, from the docstring of its file."""
    parts = ("cell", "subject", "configuration")
    configurations = [{n: record[n] for n in parts} for record in outcome.records.values()]
    environments = distinct(e for pivot in pivots for e in pivot["environments"])
    details = {
        "Versions and devices": environments,
        f"The {len(configurations)} finished cells": configurations,
    }
    return page(name, about, (section(pivot, _divergences(pivot)) for pivot in pivots), details)


def section(pivot: Pivot, figure: str) -> str:
    """A table under its heading, with a figure (HTML) above it, and the cells that failed."""
    lines = [f"<h2>{escape(table.title(pivot))}</h2>"]
    if pivot["entries"]:
        marked = [entry["row"] == pivot["baseline"] for entry in pivot["entries"]]
        lines += [
            f"<p>{escape(table.legend(pivot))}.</p>",
            figure,
            sortable([_cells(pivot, entry) for entry in pivot["entries"]], marked),
        ]
    lines += [
        f"<p class=failed>{escape(cell['row'])}, {escape(cell['column'])}, seed {cell['seed']}: "
        f"{escape(cell['error'])}</p>"
        for cell in pivot["failed"]
    ]
    return "".join(lines)


def sortable(lines: Sequence[Cells], marked: Sequence[bool]) -> str:
    """A table that a click on a heading sorts; marked lines are shaded."""
    columns = zip(*lines, strict=True)  # without a number it is text
    kinds = ["" if any(cell[1] is not None for cell in c) else " class=text" for c in columns]
    pairs = zip(kinds, lines[0], strict=True)
    heads = "".join(f"<th{kind}>{escape(heading)}</th>" for kind, (heading, *_) in pairs)
    rows = ""
    for cells, mark in zip(lines, marked, strict=True):
        shown = ""
        for kind, (_, number, text) in zip(kinds, cells, strict=True):
            value = "" if number is None else f' data-value="{number}"'
            shown += f"<td{kind}{value}>{escape(text)}</td>"
        rows += f"<tr{' class=baseline' if mark else ''}>{shown}</tr>"
    return (
        "<p>A click on a heading sorts.</p>"
        f"<div class=wide><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def image(png: bytes, what: str) -> str:
    """A picture inside the page, with the text for readers who do not see it."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{data}">'


def _cells(pivot: Pivot, entry: Entry) -> Cells:
    """The cells of an entry's line."""
    return [
        ("row", None, entry["row"]),
        ("column", None, entry["column"]),
        *table.line(entry, f"- {pivot['baseline']}" if pivot["baseline"] else ""),
        ("seeds", None, ", ".join(map(str, entry["seeds"]))),
        ("seconds", entry["seconds"], f"{entry['seconds']:.1f}"),
    ]


def _divergences(pivot: Pivot) -> str:
    from duquantpp_jax.analysis import figures  # matplotlib, which nothing else here needs

    if not pivot["entries"]:
        return ""
    svg = figures.picture(figures.divergences(pivot, "column"), "svg").decode()
    return svg[svg.index("<svg") :]
