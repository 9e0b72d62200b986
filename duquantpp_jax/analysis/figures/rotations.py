"""Figures of rotations: the matrix as an image, and the course of learning."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Integer
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from duquantpp_jax.analysis.figures import style

Lines = Mapping[str, Float[Array | np.ndarray, " _"]]
"""Numbers by name, one for each check."""


def rotation(
    matrices: Mapping[str, Float[Array | np.ndarray, "r r"]],
    *,
    title: str = "",
    columns: style.Columns = 2,
) -> Figure:
    """Matrices as images side by side, in the same colours, which are symmetric about zero.

    Args:
      matrices: Name -> matrix R of x R: rows are input channels, columns are output channels.

    Raises:
      ValueError: No matrix, or NaN or Inf.
    """
    arrays = style.given("matrices", matrices)
    top = max(float(np.abs(matrix).max()) for matrix in arrays.values())
    side = min(2.5, (style.width(columns) - 1.2) / len(arrays) - 0.3)
    figure = style.blank(columns, 1.1 + side)
    panels = figure.subplots(1, len(arrays), squeeze=False)[0]
    image: Any = None
    for axes, (name, matrix) in zip(panels, arrays.items(), strict=True):
        norm = Normalize(-top, top)
        image = axes.imshow(matrix, cmap="PuOr", norm=norm, interpolation="nearest")
        ticks = range(0, len(matrix), max(1, len(matrix) // 4))
        axes.set(xticks=ticks, yticks=ticks)
        style.label(axes, "channel out", title=name)
    panels[0].set_ylabel("channel in", fontsize=style.LABEL_SIZE)
    figure.suptitle(title, fontsize=style.LABEL_SIZE)
    bar = style.colorbar(figure, image, panels, "entry of the matrix")
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    return figure


def loss_curves(
    steps: Integer[Array | np.ndarray, " checks"],
    losses: Lines,
    orthogonality: Lines | None = None,
    *,
    loss: str = "KL, nats per target",
    title: str = "",
    columns: style.Columns = 1,
) -> Figure:
    """Losses over training and, below them, the distances of rotations from orthogonality.

    Args:
      steps: Step of each check.
      losses: Name -> loss at each check, e.g. {"training": ..., "held out": ...}.
      orthogonality: Name -> max |R^T R - I| at each check, on a log10 axis.
      loss: What the losses are, with their unit.

    Raises:
      ValueError: No loss, NaN or Inf, or a line without a number for each step.
    """
    kinds = [style.given("losses", losses)]
    if orthogonality is not None:
        kinds.append(style.given("distances", orthogonality))
    figure = style.blank(columns, 0.7 + 1.6 * len(kinds))
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, lines, y in zip(panels, kinds, (loss, r"max $|R^\top R - I|$"), strict=False):
        for name, values, look in style.styled(lines):
            if len(values) != len(steps):
                raise ValueError(
                    f"{name} has {len(values)} numbers for {len(steps)} steps: give one for each"
                )
            axes.plot(np.asarray(steps), values, label=name, linewidth=1.2, **look)
        axes.grid(linewidth=0.3)
        style.label(axes, y=y)
        style.legend(axes)
    panels[-1].set_xlabel("step", fontsize=style.LABEL_SIZE)
    if orthogonality is not None:
        panels[1].set_yscale("log")
    panels[0].set_title(title, fontsize=style.LABEL_SIZE)
    return figure
