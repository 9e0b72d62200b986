"""Pivots as text: tables for a terminal and in Markdown, their legend, and who is ahead."""

from collections.abc import Iterable, Iterator

from rich import box
from rich.table import Table

from duquantpp_jax.evaluation.intervals import clustered
from duquantpp_jax.lab.pivot import COMPARED, Entry, Pivot, distinct


def empty(*left: str, right: Iterable[str], wrap: bool = False) -> Table:
    """A table for a terminal without rows; its columns are aligned to the left or to the right."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in left:
        table.add_column(heading, no_wrap=True)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=not wrap)
    return table


def title(pivot: Pivot) -> str:
    """The model, the text and the float perplexity of a table, in one line."""
    if not pivot["entries"]:
        return "no cell is finished"
    return (
        f"{pivot['model']['name']}, {pivot['text']['name']}, {pivot['targets']:,} targets, "
        f"float perplexity {pivot['float_perplexity']:.3f}"
    )


def legend(pivot: Pivot) -> str:
    """How to read a table, in one line; says where its cells ran in different environments."""
    said = (
        "KL(float || quantized) and excess NLL in nats per token, mean over seeds (least-largest)"
    )
    if pivot["entries"] and pivot["baseline"] is not None:
        unit, count = pivot["clusters"]["unit"], pivot["clusters"]["count"]
        sources = {e["difference"]["interval"] for e in pivot["entries"] if e["difference"]}
        over = "text and, where several were run, seeds" if len(sources) > 1 else "".join(sources)
        said += (
            f"; paired difference to {pivot['baseline']} in the same column with half its 95 % "
            f"interval over {over or 'text'}, {clustered(unit, count)}"
        )
        if pivot["corrected_over"]:
            said += f"; * significant after Holm's correction over the {pivot['corrected_over']}"
    if len(environments := pivot["environments"]) > 1:
        names = distinct(name for environment in environments for name in environment)
        values = {name: distinct(str(e.get(name, "?")) for e in environments) for name in names}
        differ = [f"{name} {' | '.join(found)}" for name, found in values.items() if len(found) > 1]
        said += f"; cells were measured in {len(environments)} environments: "
        said += ", ".join(differ)
    return said


def value(entry: Entry, measure: str = "kl") -> str:
    """A measure of an entry, with the range of its seeds, or a note that it has only one seed."""
    mean, spread = entry[measure]["value"], entry[measure].get("range")
    if len(entry["seeds"]) > 1 and spread:
        return f"{mean:.4f} ({spread[0]:.4f}-{spread[1]:.4f})"
    return f"{mean:.4f}{' (1 seed)' if _drawn_once(entry) else ''}"


def _drawn_once(entry: Entry) -> bool:
    """Whether random numbers were drawn with one seed, so that an interval is over text alone."""
    return entry["draws"] and len(entry["seeds"]) == 1


def difference(entry: Entry, measure: str = "kl") -> str:
    """The paired difference of an entry with half its interval; empty without one.

    A star says that it is significant; one seed of a recipe that draws gets none (`_drawn_once`).
    """
    found = (entry["difference"] or {}).get(measure)
    if found is None:
        return ""
    said = f"{found['value']:+.4f}"
    if found["ci95"] is not None:
        low, high = found["ci95"]
        said += f" ± {(high - low) / 2:.4f}"
    return said + ("*" if found["significant"] and not _drawn_once(entry) else "")


def line(entry: Entry, beside: str) -> list[tuple[str, float | None, str]]:
    """Heading, number and text of each measure of an entry; differences stand under `beside`."""
    cells: list[tuple[str, float | None, str]] = []
    for measure, heading in COMPARED.items():
        found = (entry["difference"] or {}).get(measure, {})
        cells.append((heading, entry[measure]["value"], value(entry, measure)))
        cells.append((beside, found.get("value"), difference(entry, measure)))
    for measure, heading, digits in (("perplexity", "PPL", 3), ("sqnr_db", "SQNR dB", 2)):
        mean = entry.get(measure, {}).get("value")
        cells.append((heading, mean, "" if mean is None else f"{mean:.{digits}f}"))
    return cells


def fit_seconds(pivot: Pivot, row: str) -> str:
    """Seconds of the row's fastest fit, or empty; with compiling if all cells share one fit."""
    seconds = [e["fit_seconds"] for e in pivot["entries"] if e["row"] == row and "fit_seconds" in e]
    return f"{min(seconds):.1f}" if seconds else ""


def online(entry: Entry) -> tuple[str, str]:
    """Online cost of an entry: multiply-adds for each value of the inputs of the four sites (one
    number if they are equal), and KiB of all layers; empty where it was not measured."""
    if "online" not in entry:
        return "", ""
    costs = entry["online"].values()
    each = [f"{cost['multiply_adds']:.4g}" for cost in costs]
    kib = sum(cost["bytes"] for cost in costs) / 1024
    return each[0] if len(set(each)) == 1 else " ".join(each), f"{kib:.1f}"


def _rows(pivot: Pivot, measure: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Name of each row, and its value and difference in each column."""
    entries = {(entry["row"], entry["column"]): entry for entry in pivot["entries"]}
    for row in pivot["rows"]:
        found = [entries.get((row, column)) for column in pivot["columns"]]
        yield row, [(value(e, measure), difference(e, measure)) if e else ("", "") for e in found]


def terminal(pivot: Pivot, measure: str = "kl") -> Table:
    """A table of one measure for a terminal, with differences below values."""
    table = empty(COMPARED[measure], right=pivot["columns"])
    for row, pairs in _rows(pivot, measure):
        table.add_row(row, *("\n".join(pair).strip() for pair in pairs))
    return table


def markdown(pivot: Pivot, measure: str = "kl") -> str:
    """A Markdown table of one measure, with differences beside values, and `fit_seconds` last where
    the pivot has them."""
    timed = any("fit_seconds" in entry for entry in pivot["entries"])
    heads = [head for c in pivot["columns"] for head in (c, f"- {pivot['baseline']}")]
    heads += ["fit, s"] * timed
    lines = [f"| {' | '.join((COMPARED[measure], *heads))} |", "| --- |" + " ---: |" * len(heads)]
    for row, pairs in _rows(pivot, measure):
        cells = [text for pair in pairs for text in pair] + [fit_seconds(pivot, row)] * timed
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(pivot: Pivot) -> str:
    """One sentence: the recipe that is ahead of the baseline in each column, or that none is.

    A recipe is ahead if its KL is lower, the paired difference is significant after Holm's
    correction and, if the recipe draws random numbers, several seeds were measured.
    """
    baseline = pivot["baseline"]
    ranked = sorted(pivot["entries"], key=lambda entry: entry["kl"]["value"])
    columns = {c: [e for e in ranked if e["column"] == c] for c in pivot["columns"]}
    parts = [f"under {column} {_leader(found, baseline)}" for column, found in columns.items()]
    opening = f"In KL against {baseline}: " if baseline else "Without a baseline to compare with: "
    return opening + "; ".join(parts) + "."


def _leader(entries: list[Entry], baseline: str | None) -> str:
    """Who is ahead in a column whose entries are sorted by KL."""
    first = entries[0]
    others = [entry for entry in entries if entry["row"] != baseline]
    if baseline is None or not others:
        return f"{first['row']} has the least KL ({first['kl']['value']:.4f})"
    nearest = others[0]
    if nearest["difference"]["kl"]["ci95"] is None:
        return "one row gives no interval"
    if first is not nearest and not _doubt(nearest):
        return f"{baseline} is ahead (next {nearest['row']} {_interval(nearest)})"
    for entry in others:
        if entry["difference"]["kl"]["value"] < 0 and not _doubt(entry):
            said = f"{entry['row']} is ahead ({_interval(entry)})"
            if entry is not first:
                said += f", and of less KL, but not shown to be, {first['row']} {_interval(first)}"
                said += _doubt(first)
            return said
    said = f"{nearest['row']} {_interval(nearest)}{_doubt(nearest)}"
    return f"no recipe is shown to be ahead (nearest {said})"


def _interval(entry: Entry) -> str:
    found = entry["difference"]["kl"]
    low, high = found["ci95"]
    return f"{found['value']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}"


def _doubt(entry: Entry) -> str:
    """Why the difference of an entry is no evidence; empty if it is."""
    if not entry["difference"]["kl"]["significant"]:
        return ", not significant among all differences shown"
    if _drawn_once(entry):
        return " over text alone: one seed of a recipe that draws random numbers, give several"
    return ""
