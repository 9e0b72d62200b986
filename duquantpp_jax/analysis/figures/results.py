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
    results: dict[str, Any],
    channels: tuple[str, dict[str, Float[np.ndarray, " k"]]],
    clusters: tuple[str, int],
) -> Figure:
    """KL of every recipe and scale rule, and what the recipes do to one site's channels.

    Left: KL to the float model; the bar is the 95 % interval of the paired difference to
    block_hadamard under the same rule, drawn around the recipe's KL (block_hadamard has none).
    Right: the largest magnitude of each channel before and after, from the largest to the least.

    Args:
      results: The contents of a results.json.
      channels: A site's name, and channel maxima under "before" and by recipe.
      clusters: What intervals are clustered by, and how many clusters there are.
    """
    figure = blank(2, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _kl(left, results, clusters, "block_hadamard")
    site, maxima = channels
    _channels(right, maxima, site)
    for axes, title, across in ((left, "scale rule", 3), (right, "", 2)):
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "columnspacing": 1.0}
        legend(axes, title=title, ncols=across, **below)
    return figure


def divergences(
    results: dict[str, Any],
    clusters: tuple[str, int],
    baseline: str | None,
    title: str = "scale rule",
    *,
    columns: Columns = 2,
) -> Figure:
    """KL of every recipe and scale rule alone, as in `comparison`; some may be missing.

    Args:
      results: As there.
      clusters: As there.
      baseline: What the differences are to.
      title: Of the legend.

    Raises:
      ValueError: Another number of columns than 1 or 2.
    """
    height = 1.2 + 0.28 * len(results["options"]["recipes"])
    figure = blank(columns, height)
    axes = figure.subplots()
    _kl(axes, results, clusters, baseline)
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


def _kl(
    axes: Any,
    results: dict[str, Any],
    clusters: tuple[str, int],
    baseline: str | None,
) -> None:
    names, rules = results["options"]["recipes"], results["options"]["scale_rules"]
    for number, rule in enumerate(rules):
        rows = {row["recipe"]: row for row in results["rows"] if row["scale_rule"] == rule}
        there = [name for name in names if name in rows]
        kl = np.array([rows[name]["kl"] for name in there])
        bars = np.array([_interval_around(rows[name]) for name in there]).reshape(-1, 2).T
        offset = 0.5 * (number / max(len(rules) - 1, 1) - 0.5)
        axes.errorbar(
            kl,
            np.array([names.index(name) for name in there]) + offset,
            xerr=bars,
            fmt=MARKERS[number % len(MARKERS)],
            color=COLORS[number % len(COLORS)],
            markersize=4,
            capsize=2,
            linewidth=1,
            label=rule,
        )
    axes.set_yticks(range(len(names)), names, fontsize=LABEL_SIZE)
    axes.invert_yaxis()
    axes.grid(axis="x", linewidth=0.3)
    axes.tick_params(axis="x", labelsize=LABEL_SIZE)
    axes.set_xlabel("KL(float || quantized), nats per token", fontsize=LABEL_SIZE)
    axes.set_title(
        f"{results['targets']:,} targets; bars: 95 % interval of the paired\n"
        f"difference to {baseline}, by {clusters[0]} ({clusters[1]})"
        if baseline
        else f"{results['targets']:,} targets",
        fontsize=LABEL_SIZE,
    )


def _interval_around(row: dict[str, Any]) -> tuple[float, float]:
    if row["kl_difference_ci95"] is None:
        return 0.0, 0.0
    low, high = row["kl_difference_ci95"]
    return row["kl_difference"] - low, high - row["kl_difference"]


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
