"""A self-contained HTML page of a grid: sortable tables, figures, configurations, versions."""

import json
from html import escape

from duquantpp_jax.lab import table
from duquantpp_jax.lab.pivot import Entry, Pivot, distinct
from duquantpp_jax.lab.running import Outcome

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em;
       color: #222; }
h1 { font-size: 1.4em } h2 { font-size: 1.15em; margin-top: 2em }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .8em; font-size: 12px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
.wide { overflow-x: auto }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd;
         white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
th { cursor: pointer; border-bottom: 2px solid #444 } th:hover { background: #eef }
tr.baseline td { background: #f3f3f3 } .failed { color: #a00 }
svg { max-width: 100%; height: auto }
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


def webpage(name: str, about: str, pivots: list[Pivot], outcome: Outcome) -> str:
    """The HTML of the page; `about` is the question of the grid, from the docstring of its file."""
    parts = ("cell", "subject", "configuration")
    configurations = [{n: record[n] for n in parts} for record in outcome.records.values()]
    environments = distinct(e for pivot in pivots for e in pivot["environments"])
    return "".join(
        [
            f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{escape(name)}</title>",
            f"<style>{_STYLE}</style><h1>{escape(name)}</h1><pre>{escape(about)}</pre>",
            *map(_section, pivots),
            "<h2>Versions and devices</h2>",
            *(f"<pre>{escape(json.dumps(e, indent=1))}</pre>" for e in environments),
            f"<h2>Configuration of the {len(configurations)} finished cells</h2>",
            f"<details><summary>JSON</summary><pre>{escape(json.dumps(configurations, indent=1))}",
            f"</pre></details><script>{_SCRIPT}</script></html>\n",
        ]
    )


def _section(pivot: Pivot) -> str:
    lines = [f"<h2>{escape(table.title(pivot))}</h2>"]
    if pivot["entries"]:
        headings = [heading for heading, *_ in _cells(pivot, pivot["entries"][0])]
        heads = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
        rows = "".join(_row(pivot, entry) for entry in pivot["entries"])
        lines += [
            f"<p>{escape(table.legend(pivot))}.</p>",
            _figure(pivot),
            "<p>A click on a heading sorts.</p>",
            f"<div class=wide><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>",
            "</div>",
        ]
    lines += [
        f"<p class=failed>{escape(cell['row'])}, {escape(cell['column'])}, seed {cell['seed']}: "
        f"{escape(cell['error'])}</p>"
        for cell in pivot["failed"]
    ]
    return "".join(lines)


def _cells(pivot: Pivot, entry: Entry) -> list[tuple[str, float | None, str]]:
    """Heading, number to sort by and text of each cell of an entry's line."""
    return [
        ("row", None, entry["row"]),
        ("column", None, entry["column"]),
        *table.line(entry, f"- {pivot['baseline']}" if pivot["baseline"] else ""),
        ("seeds", None, ", ".join(map(str, entry["seeds"]))),
        ("seconds", entry["seconds"], f"{entry['seconds']:.1f}"),
    ]


def _row(pivot: Pivot, entry: Entry) -> str:
    mark = " class=baseline" if entry["row"] == pivot["baseline"] else ""
    cells = ""
    for _, number, text in _cells(pivot, entry):
        value = "" if number is None else f' data-value="{number}"'
        cells += f"<td{value}>{escape(text)}</td>"
    return f"<tr{mark}>{cells}</tr>"


def _figure(pivot: Pivot) -> str:
    from duquantpp_jax.analysis import figures  # matplotlib, which nothing else here needs

    svg = figures.picture(figures.divergences(pivot, "column"), "svg").decode()
    return svg[svg.index("<svg") :]
