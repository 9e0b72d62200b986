"""Results: KL with its paired intervals, and what recipes do to one site's channels."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from duquantpp_jax.analysis.figures.style import (
    COLORS,
    DASHES,
    LABEL_SIZE,
    MARKERS,
    Columns,
    blank,
    given,
    legend,
    legend_below,
)


def comparison(
    pivot: dict[str, Any], channels: tuple[str, Mapping[str, Float[np.ndarray, " k"]]]
) -> Figure:
    """KL of every recipe and format, and what the recipes do to one site's channels.

    Left: KL to the float model; the bar is the 95 % interval of the paired difference to the
    baseline in the same format, drawn around the recipe's KL (the baseline has none).
    Right: the largest magnitude of each channel before and after, from the largest to the least.

    Args:
      pivot: The contents of a results.json of `compare`, or a table of a grid's summary.
      channels: A site's name, and channel maxima under "before" and by recipe.
    """
    figure = blank(2, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _kl(left, pivot)
    site, maxima = channels
    _channels(right, maxima, site)
    for axes, title, across in ((left, "format", 3), (right, "", 2)):
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "columnspacing": 1.0}
        legend(axes, title=title, ncols=across, **below)
    return figure


def divergences(pivot: dict[str, Any], title: str = "format", *, columns: Columns = 2) -> Figure:
    """KL of every row and column of a pivot alone, as in `comparison`; some may be missing.

    Args:
      pivot: As there.
      title: Of the legend.

    Raises:
      ValueError: Another number of columns than 1 or 2.
    """
    height = 1.2 + 0.28 * len(pivot["rows"])
    figure = blank(columns, height)
    axes = figure.subplots()
    _kl(axes, pivot)
    # Legends are outside the axes: with many columns they would hide what they explain.
    if columns == 1:
        figure.suptitle(axes.get_title(), fontsize=LABEL_SIZE)  # wider than the axes
        axes.set_title("")
        legend_below(figure, axes, title=title)
    else:
        legend(axes, title=title, loc=(1.02, 0), borderaxespad=0)
    return figure


def channels(
    maxima: Mapping[str, Float[Array | np.ndarray, " k"]],
    *,
    title: str = "",
    columns: Columns = 1,
) -> Figure:
    """The largest magnitude of each channel, from the largest channel to the least; log2 both ways.

    Args:
      maxima: By name; "before" is drawn broad and grey, to lie under the others.
      title: E.g. the site's name.

    Raises:
      ValueError: No maxima, NaN or Inf.
    """
    figure = blank(columns, 2.6)
    axes = figure.subplots()
    _channels(axes, given("maxima", maxima), title)
    legend(axes)
    return figure


def _kl(axes: Any, pivot: dict[str, Any]) -> None:
    names, columns = pivot["rows"], pivot["columns"]
    offsets = np.linspace(-0.25, 0.25, len(columns)) if len(columns) > 1 else [0.0]
    for number, (column, offset) in enumerate(zip(columns, offsets, strict=True)):
        entries = [entry for entry in pivot["entries"] if entry["column"] == column]
        bars = np.array([_interval_around(entry) for entry in entries]).reshape(-1, 2).T
        axes.errorbar(
            [entry["kl"]["value"] for entry in entries],
            np.array([names.index(entry["row"]) for entry in entries]) + offset,
            xerr=bars,
            fmt=MARKERS[number % len(MARKERS)],
            color=COLORS[number % len(COLORS)],
            markersize=4,
            capsize=2,
            linewidth=1,
            label=column,
        )
    axes.set_yticks(range(len(names)), names, fontsize=LABEL_SIZE)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.3)
    axes.tick_params(axis="x", labelsize=LABEL_SIZE)
    axes.set_xlabel("KL(float || quantized), nats per token", fontsize=LABEL_SIZE)
    title = f"{pivot['targets']:,} targets"
    if pivot["baseline"]:
        unit, count = pivot["clusters"]["unit"], pivot["clusters"]["count"]
        title += (
            f"; bars: 95 % interval of the paired\ndifference to {pivot['baseline']}, "
            f"by {unit} ({count})"
        )
    axes.set_title(title, fontsize=LABEL_SIZE)


def _interval_around(entry: dict[str, Any]) -> tuple[float, float]:
    """How far the interval of a difference in KL reaches below and above it."""
    found = entry["difference"] and entry["difference"]["kl"]
    if not found or found["ci95"] is None:
        return 0.0, 0.0
    low, high = found["ci95"]
    return found["value"] - low, high - found["value"]


def _channels(axes: Any, maxima: Mapping[str, Float[np.ndarray, " k"]], title: str) -> None:
    for number, (name, values) in enumerate(maxima.items()):
        before = name == "before"
        axes.plot(
            np.arange(1, len(values) + 1),
            np.sort(values)[::-1],
            color="#999999" if before else COLORS[(number - 1) % len(COLORS)],
            linewidth=3 if before else 1.2,
            linestyle="-" if before else DASHES[(number - 1) % len(DASHES)],
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("channels, largest first", fontsize=LABEL_SIZE)
    axes.set_ylabel("largest |x| of the channel", fontsize=LABEL_SIZE)
    axes.set_title(title, fontsize=LABEL_SIZE)
    axes.tick_params(labelsize=LABEL_SIZE)
