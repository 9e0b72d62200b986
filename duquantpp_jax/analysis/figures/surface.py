"""|X| as a surface over tokens and channels: where outliers sit, and where a transform puts them.

Surfaces are made coarse by the maximum over rectangles of tokens and channels,

    s_ij = max |x_tc|  over t in rectangle row i, c in rectangle column j,

since a mean would take away the very thing that is looked for.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from duquantpp_jax.analysis.figures import style

POINTS = (64, 96)
"""Most points of a surface along tokens and channels: more cannot be told apart on paper."""


def surface(
    inputs: Mapping[str, Float[Array | np.ndarray, "tokens k"]],
    *,
    title: str = "",
    points: tuple[int, int] = POINTS,
    columns: style.Columns = 2,
) -> Figure:
    """|X| over token and channel, a panel for each input, all on one linear z axis.

    Args:
      inputs: By name, e.g. {"before": x, "Hadamard": t.activations(x)}; in units of x.
      title: Above all panels, e.g. the site's name.
      points: Most points along tokens and channels; each is the maximum of what it stands for.

    Raises:
      ValueError: No input, an empty one, or one with NaN or Inf.
    """
    arrays = {name: coarse(np.abs(x), points) for name, x in style.given("inputs", inputs).items()}
    top = max(float(z.max()) for z, _, _ in arrays.values())
    figure = style.blank(columns, 0.5 + style.WIDTHS[columns] / len(arrays) * 0.85)
    figure.suptitle(title, fontsize=style.LABEL_SIZE)
    for number, (name, (z, tokens, channels)) in enumerate(arrays.items()):
        axes: Any = figure.add_subplot(1, len(arrays), number + 1, projection="3d")
        x, y = np.meshgrid(channels, tokens)
        drawn = axes.plot_surface(
            x, y, z, rstride=1, cstride=1, cmap="cividis", norm=Normalize(0, top), linewidth=0
        )
        drawn.set_array(_corner_maxima(z).ravel())
        drawn.set_rasterized(True)
        axes.set_zlim(0, top)
        style.label(axes, "channel", "token", name)
        axes.set_zlabel("|x|", fontsize=style.LABEL_SIZE)
    return figure


def coarse(
    magnitudes: Float[np.ndarray, "tokens k"], points: tuple[int, int]
) -> tuple[Float[np.ndarray, "i j"], Float[np.ndarray, " i"], Float[np.ndarray, " j"]]:
    """Maxima over rectangles, as few and as even as `points` asks for.

    Returns:
      The maxima, and the first token and first channel of each rectangle.
    """
    starts = [
        np.linspace(0, size, min(size, most), endpoint=False).astype(np.int64)
        for size, most in zip(magnitudes.shape, points, strict=True)
    ]
    over_tokens = np.maximum.reduceat(magnitudes, starts[0], axis=0)
    maxima = np.maximum.reduceat(over_tokens, starts[1], axis=1)
    return maxima, starts[0].astype(np.float64), starts[1].astype(np.float64)


def _corner_maxima(z: Float[np.ndarray, "i j"]) -> Float[np.ndarray, "i-1 j-1"]:
    """The largest corner of each facet: matplotlib's own colour is their mean, which would paint
    a peak of one point like the plain around it."""
    return np.max([z[:-1, :-1], z[1:, :-1], z[:-1, 1:], z[1:, 1:]], axis=0)
