"""|X| as a surface over tokens and channels, which shows outliers before and after a transform.

A surface has fewer points than X. Each is the maximum over a rectangle of tokens and channels,

    s_ij = max |x_tc|  over t in row i of rectangles, c in column j,

because a mean would hide the outliers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from duquantpp_jax.analysis.figures import style

POINTS = (64, 96)
"""Most points of a surface along tokens and channels; print shows no more."""
MARGINS = (0.12, 0.2, 0.39, 0.32)
"""Inches left of each surface, below it, right of it (labels of the z axis) and above."""


def surface(
    inputs: Mapping[str, Float[Array | np.ndarray, "tokens k"]],
    *,
    log2: bool = False,
    title: str = "",
    points: tuple[int, int] = POINTS,
    columns: style.Columns = 2,
) -> Figure:
    """|X| over token and channel: a panel for each input, all with the same z axis.

    Args:
      inputs: By name, e.g. {"before": x, "Hadamard": t.activations(x)}.
      log2: z is log2 |x|, from the least point (or 2^-16 of the largest) up, which also shows what
        lies below an outlier; else z is |x|, from zero.

    Raises:
      ValueError: No input, NaN or Inf, or fewer than 2 tokens or channels.
    """
    surfaces = {}
    for name, x in style.given("inputs", inputs).items():
        if min(x.shape) < 2:
            raise ValueError(f"{name} has shape {x.shape}: give at least 2 tokens and channels")
        surfaces[name] = coarse(np.abs(x.astype(np.float64)), points)
    heights = {name: z for name, (z, _, _) in surfaces.items()}
    low, high = 0.0, float(max(z.max() for z in heights.values())) or 1.0
    if log2:
        least = max(min(float(z.min()) for z in heights.values()), high * 2.0**-16)
        heights = {n: np.log2(np.maximum(z, high * 2.0**-16)) for n, z in heights.items()}
        low, high = np.log2(style.powers_of_two(np.array([least, high])))
    across = style.width(columns) / len(surfaces)
    down = min(across, 3.0) * 0.9 + 0.3
    left, below, right, above = MARGINS
    figure = style.blank(columns, down)
    figure.set_layout_engine("none")  # constrained layout ignores the labels of axes in 3-D
    figure.suptitle(title, fontsize=style.LABEL_SIZE, y=0.98, va="top")
    for number, (name, (_, tokens, channels)) in enumerate(surfaces.items()):
        box = (number * across + left, below, across - left - right, down - below - above)
        page = (style.width(columns), down) * 2
        axes: Any = figure.add_axes(tuple(np.divide(box, page)), projection="3d")
        (x, y), z = np.meshgrid(channels, tokens), heights[name]
        look = {"cmap": "viridis", "norm": Normalize(low, high), "linewidth": 0}
        # Antialiasing would draw seams between the facets.
        drawn = axes.plot_surface(x, y, z, rstride=1, cstride=1, antialiased=False, **look)
        # A facet has the colour of its largest corner; Matplotlib's mean would hide a peak.
        corners = z[:-1, :-1], z[1:, :-1], z[:-1, 1:], z[1:, 1:]
        drawn.set_array(np.max(corners, axis=0).ravel())
        drawn.set_rasterized(True)
        axes.set_zlim(low, high)
        axes.set_box_aspect(None, zoom=1.08)
        axes.set_title(name, fontsize=style.LABEL_SIZE, y=1.05, pad=0)
        axes.set_xlabel("channel", fontsize=style.LABEL_SIZE, labelpad=-8)
        axes.set_ylabel("token", fontsize=style.LABEL_SIZE, labelpad=-6)
        axes.set_zlabel("|x|", fontsize=style.LABEL_SIZE, labelpad=-9)
        axes.tick_params(labelsize=style.TICK_SIZE, pad=-3)
        for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
            axis.set_major_locator(MaxNLocator(integer=True, nbins=4 if across > 2 else 3))
        if log2:
            axes.zaxis.set_major_formatter(FuncFormatter(style.power_of_two))
    return figure


def coarse(
    magnitudes: Float[np.ndarray, "tokens k"], points: tuple[int, int]
) -> tuple[Float[np.ndarray, "i j"], Float[np.ndarray, " i"], Float[np.ndarray, " j"]]:
    """Maxima over at most `points` rectangles of even size.

    Returns:
      The maxima, and the first token and first channel of each rectangle.
    """
    tokens, channels = map(style.starts, magnitudes.shape, points)
    maxima = np.maximum.reduceat(np.maximum.reduceat(magnitudes, tokens), channels, axis=1)
    return maxima, tokens.astype(np.float64), channels.astype(np.float64)
