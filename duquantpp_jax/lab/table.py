"""Pivots in words: tables for a terminal and in Markdown, what differs, and who is ahead."""

from typing import Any

from rich import box
from rich.table import Table

from duquantpp_jax.lab.pivot import COMPARED, Entry, Pivot, distinct


def title(pivot: Pivot) -> str:
    """What a table is of, in one line."""
    if not pivot["entries"]:
        return "no cell is finished"
    return (
        f"{pivot['model']['name']}, {pivot['text']['name']}, {pivot['targets']:,} targets, "
        f"float perplexity {pivot['float_perplexity']:.3f}"
    )


def legend(pivot: Pivot) -> str:
    """How to read a table, in one line; where its cells were not measured alike, says so."""
    said = (
        "KL(float || quantized) and excess NLL in nats per token, mean over seeds (least-largest)"
    )
    if pivot["entries"] and pivot["baseline"] is not None:
        unit, count = pivot["clusters"]["unit"], pivot["clusters"]["count"]
        sources = {e["difference"]["interval"] for e in pivot["entries"] if e["difference"]}
        over = "text and, where several were run, seeds" if len(sources) > 1 else "".join(sources)
        said += (
            f"; paired difference to {pivot['baseline']} in the same column with half its 95 % "
            f"interval over {over or 'text'}, clustered by {unit} ({count})"
        )
        if pivot["corrected_over"]:
            said += f"; * significant after Holm's correction over the {pivot['corrected_over']}"
    return "; ".join([said, *machines(pivot["environments"])])


def machines(environments: list[dict[str, Any]]) -> list[str]:
    """What differs between the environments that cells were measured in; nothing if none does."""
    if len(environments) < 2:
        return []
    names = distinct(name for one in environments for name in one)
    values = {name: distinct(str(one.get(name, "?")) for one in environments) for name in names}
    differ = [f"{name} {' | '.join(found)}" for name, found in values.items() if len(found) > 1]
    return [f"cells were measured on {len(environments)} kinds of machines: {', '.join(differ)}"]


def value(entry: Entry, measure: str = "kl") -> str:
    """A measure of an entry, and the spread of its seeds, or that there is no such spread yet."""
    mean, spread = entry[measure]["value"], entry[measure].get("range")
    if len(entry["seeds"]) > 1 and spread:
        return f"{mean:.4f} ({spread[0]:.4f}-{spread[1]:.4f})"
    return f"{mean:.4f}" + (" (1 seed)" if entry["draws"] and len(entry["seeds"]) == 1 else "")


def difference(entry: Entry, measure: str = "kl") -> str:
    """The paired difference of an entry, with half its interval and its star."""
    found = (entry["difference"] or {}).get(measure)
    if found is None:
        return ""
    said = f"{found['value']:+.4f}"
    if found["ci95"] is not None:
        low, high = found["ci95"]
        said += f" ± {(high - low) / 2:.4f}"
    return said + ("*" if found["significant"] else "")


def fit_seconds(pivot: Pivot, row: str) -> str:
    """Of the row's fastest fit, compiling included where all its cells share one; nothing where no
    cell is finished, or in summaries that were written without."""
    there = [one for one in pivot["entries"] if one["row"] == row]
    seconds = [one["fit_seconds"] for one in there if "fit_seconds" in one]
    return f"{min(seconds):.1f}" if seconds else ""


def online(entry: Entry) -> tuple[str, str]:
    """Multiply-adds for each value of the inputs of the four sites (a single number where they are
    equal) and KiB of all layers; nothing where it was not measured."""
    if "online" not in entry:
        return "", ""
    costs = entry["online"].values()
    each = [f"{cost['multiply_adds']:.4g}" for cost in costs]
    kib = sum(cost["bytes"] for cost in costs) / 1024
    return each[0] if len(set(each)) == 1 else " ".join(each), f"{kib:.1f}"


def terminal(pivot: Pivot, measure: str = "kl") -> Table:
    """A measure of the pivot for a terminal, and the difference below it."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(COMPARED[measure], no_wrap=True)
    for column in pivot["columns"]:
        table.add_column(column, justify="right", no_wrap=True)
    entries = {(one["row"], one["column"]): one for one in pivot["entries"]}
    for row in pivot["rows"]:
        there = [entries.get((row, column)) for column in pivot["columns"]]
        pairs = [(value(e, measure), difference(e, measure)) if e else ("",) for e in there]
        table.add_row(row, *("\n".join(pair).strip() for pair in pairs))
    return table


def markdown(pivot: Pivot, measure: str = "kl") -> str:
    """A measure of the pivot as a Markdown table: each column's values and differences side by
    side, and last `fit_seconds` where a summary has them."""
    beside = f"- {pivot['baseline']}"
    heads = [head for column in pivot["columns"] for head in (column, beside)]
    timed = any("fit_seconds" in one for one in pivot["entries"])
    heads += ["fit, s"] * timed
    lines = [
        f"| {COMPARED[measure]} | " + " | ".join(heads) + " |",
        "| --- |" + " ---: |" * len(heads),
    ]
    entries = {(one["row"], one["column"]): one for one in pivot["entries"]}
    for row in pivot["rows"]:
        there = [entries.get((row, column)) for column in pivot["columns"]]
        pairs = [(value(e, measure), difference(e, measure)) if e else ("", "") for e in there]
        cells = [text for pair in pairs for text in pair]
        cells += [fit_seconds(pivot, row)] * timed
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(pivot: Pivot) -> str:
    """One sentence: who is ahead of the baseline in each format, or that no one is.

    Ahead is the least KL whose paired difference is significant after Holm's correction and, where
    the recipe draws random numbers, accounts for seeds.
    """
    parts = []
    for column in pivot["columns"]:
        entries = sorted(
            (entry for entry in pivot["entries"] if entry["column"] == column),
            key=lambda entry: entry["kl"]["value"],
        )
        parts.append(f"under {column} {_leader(entries, pivot['baseline'])}")
    baseline = pivot["baseline"]
    opening = f"In KL against {baseline}: " if baseline else "Without a baseline to compare with: "
    return opening + "; ".join(parts) + "."


def _leader(entries: list[Entry], baseline: str | None) -> str:
    """Who of a column, sorted by KL, is ahead."""
    first = entries[0]
    others = [entry for entry in entries if entry["row"] != baseline]
    if baseline is None or not others:
        return f"{first['row']} has the least KL ({first['kl']['value']:.4f})"
    nearest = others[0]
    if nearest["difference"]["kl"]["ci95"] is None:
        return "one row gives no interval"
    if first is not nearest and not _doubt(nearest):
        return f"{baseline} is ahead (next {_interval(nearest)})"
    for entry in others:
        if entry["difference"]["kl"]["value"] < 0 and not _doubt(entry):
            said = f"{entry['row']} is ahead ({_interval(entry).partition(' ')[2]})"
            if entry is not first:
                said += f", and of less KL, but not shown to be, {_interval(first)}{_doubt(first)}"
            return said
    return f"no recipe is shown to be ahead (nearest {_interval(nearest)}{_doubt(nearest)})"


def _interval(entry: Entry) -> str:
    found = entry["difference"]["kl"]
    low, high = found["ci95"]
    return f"{entry['row']} {found['value']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}"


def _doubt(entry: Entry) -> str:
    """Why a difference shows nothing; empty where it does."""
    if not entry["difference"]["kl"]["significant"]:
        return ", not significant among all differences shown"
    if entry["draws"] and len(entry["seeds"]) == 1:
        return " over text alone: one seed of a recipe that draws random numbers, give several"
    return ""
