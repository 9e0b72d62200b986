"""Figures of results: KL with its paired intervals, and channel maxima under each recipe."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from duquantpp_jax.analysis.figures import style
from duquantpp_jax.analysis.figures.style import COLORS, LABEL_SIZE, MARKERS


def comparison(
    pivot: dict[str, Any], channels: tuple[str, Mapping[str, Float[np.ndarray, " k"]]]
) -> Figure:
    """KL of every recipe and format, and the channel maxima of one site under each recipe.

    Left: KL to the float model. The bar is the 95 % interval of the paired difference to the
    baseline in the same format, drawn around the recipe's KL; the baseline has no bar.
    Right: the largest magnitude of each channel, from the largest to the least.

    Args:
      pivot: The contents of a results.json of `compare`, or a table of a grid's summary.
      channels: A site's name, and its channel maxima under "before" and by recipe.
    """
    figure = style.blank(2, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _kl(left, pivot)
    site, maxima = channels
    _channels(right, maxima, site)
    for axes, title, across in ((left, "format", 3), (right, "", 2)):
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "columnspacing": 1.0}
        style.legend(axes, title=title, ncols=across, **below)
    return figure


def divergences(
    pivot: dict[str, Any], title: str = "format", *, columns: style.Columns = 2
) -> Figure:
    """KL as in `comparison`, of a pivot of which entries may be missing; `title` of the legend."""
    figure = style.blank(columns, 1.2 + 0.28 * len(pivot["rows"]))
    axes = figure.subplots()
    _kl(axes, pivot)
    # Legends are outside the axes, where many columns hide no points.
    if columns == 1:
        figure.suptitle(axes.get_title(), fontsize=LABEL_SIZE)  # wider than the axes
        axes.set_title("")
        style.legend_below(figure, axes, title)
    else:
        style.legend(axes, title=title, loc=(1.02, 0), borderaxespad=0)
    return figure


def _kl(axes: Any, pivot: dict[str, Any]) -> None:
    names, columns = pivot["rows"], pivot["columns"]
    offsets = np.linspace(-0.25, 0.25, len(columns)) if len(columns) > 1 else [0.0]
    for number, (column, offset) in enumerate(zip(columns, offsets, strict=True)):
        entries = [entry for entry in pivot["entries"] if entry["column"] == column]
        y = np.array([names.index(entry["row"]) for entry in entries]) + offset
        bars = np.array([_interval_around(entry) for entry in entries]).reshape(-1, 2).T
        look = {"fmt": MARKERS[number % len(MARKERS)], "color": COLORS[number % len(COLORS)]}
        look |= {"markersize": 4, "capsize": 2, "linewidth": 1}
        axes.errorbar([e["kl"]["value"] for e in entries], y, xerr=bars, label=column, **look)
    title = f"{pivot['targets']:,} targets"
    if pivot["baseline"]:
        unit, count = pivot["clusters"]["unit"], pivot["clusters"]["count"]
        title += (
            f"; bars: 95 % interval of the paired\ndifference to {pivot['baseline']}, "
            f"by {unit} ({count})"
        )
    style.label(axes, "KL(float || quantized), nats per token", title=title)
    axes.tick_params(labelsize=LABEL_SIZE)
    axes.set_yticks(range(len(names)), names, fontsize=LABEL_SIZE)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.3)


def _interval_around(entry: dict[str, Any]) -> tuple[float, float]:
    """Distances from a difference in KL to both ends of its interval."""
    found = entry["difference"] and entry["difference"]["kl"]
    if not found or found["ci95"] is None:
        return 0.0, 0.0
    low, high = found["ci95"]
    return found["value"] - low, high - found["value"]


def _channels(axes: Any, maxima: Mapping[str, Float[np.ndarray, " k"]], title: str) -> None:
    """Draws sorted maxima; "before" is broad and grey, to be seen under the others."""
    others = {name: values for name, values in maxima.items() if name != "before"}
    looks = {name: look | {"linewidth": 1.2} for name, _, look in style.styled(others)}
    looks["before"] = {"color": "#999999", "linewidth": 3}
    for name, values in maxima.items():
        x, y = np.arange(1, len(values) + 1), np.sort(values)[::-1]
        axes.plot(x, y, label=name, **looks[name])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    style.label(axes, "channels, largest first", "largest |x| of the channel", title)
    axes.tick_params(labelsize=LABEL_SIZE)
