"""Figures of notebooks and experiments alone; the others are in analysis/figures.

    error_ecdf, block_errors   errors of blocks: F(e) = #{b: e_b <= e} / blocks, and two methods
                               block by block; log2 axes have no place for blocks without error,
                               so labels give their number
    rotation, loss_curves      a rotation as an image, and the course of learning
    roofline                   FLOP/s <= min(peak, bandwidth * FLOP/byte)

Source of the roofline: Williams, Waterman and Patterson, Roofline, CACM 52(4), 2009.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Float, Integer
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from duquantpp_jax.analysis.figures import style

ERROR = "squared error of a block"

Errors = Mapping[str, Float[Array | np.ndarray, " blocks"]]
"""Method -> error of each block, >= 0."""
Lines = Mapping[str, Float[Array | np.ndarray, " _"]]
"""Numbers by name, one for each check."""


def error_ecdf(
    errors: Errors, *, label: str = ERROR, title: str = "", columns: style.Columns = 1
) -> Figure:
    """Share of blocks with at most a given error: F(e) = #{b: e_b <= e} / blocks.

    Args:
      label: What the errors are, with their unit.

    Raises:
      ValueError: No method, or NaN, Inf or negative errors.
    """
    figure = style.blank(columns, 2.4)
    axes = figure.subplots()
    _ecdf(axes, _checked(errors), label)
    axes.set_title(title, fontsize=style.LABEL_SIZE)
    style.legend_below(figure, axes)
    return figure


def block_errors(
    errors: Errors, pair: tuple[str, str], *, label: str = ERROR, title: str = ""
) -> Figure:
    """`error_ecdf` of all methods beside a scatter of two of them, a point for each block.

    On the diagonal of the scatter both methods have the same error.

    Args:
      errors: The methods of the pair have the same blocks in the same order.
      pair: The two methods, x axis first.
      label: What the errors are, with their unit.

    Raises:
      ValueError: `pair` names no method or has different blocks, or as in `error_ecdf`.
    """
    arrays = _checked(errors)
    for name in pair:
        if name not in arrays:
            raise ValueError(f"{name!r} is not among {', '.join(arrays)}: pair two of them")
    figure = style.blank(2, 3.3)
    left, right = figure.subplots(1, 2)
    _ecdf(left, arrays, label)
    style.legend(left)
    _scatter(right, arrays, pair, label)
    figure.suptitle(title, fontsize=style.LABEL_SIZE)
    return figure


def _ecdf(axes: Any, arrays: dict[str, np.ndarray], label: str) -> None:
    for name, values, look in style.styled(arrays):
        steps, share = np.sort(values), np.arange(1, len(values) + 1) / len(values)
        zeros = int(np.sum(values == 0))
        name = f"{name} ({zeros:,} without error)" if zeros else name
        axes.step(steps, share, where="post", label=name, linewidth=1.2, **look)
    log2_axis(axes, "x", *style.powers_of_two(np.concatenate([*arrays.values()])))
    axes.set_ylim(0, 1)
    axes.grid(linewidth=0.3)
    style.label(axes, label, "share of blocks")


def _scatter(axes: Any, arrays: dict[str, np.ndarray], pair: tuple[str, str], label: str) -> None:
    (first, second), (x, y) = pair, (arrays[name] for name in pair)
    if len(x) != len(y):
        raise ValueError(
            f"{first} has {len(x)} blocks and {second} {len(y)}: give the same blocks to both"
        )
    drawn = (x > 0) & (y > 0)
    low, high = style.powers_of_two(np.concatenate([x[drawn], y[drawn]]))
    alpha = float(np.clip(4000 / len(x), 0.25, 0.7))  # a single point must be visible, too
    points = {"s": 2, "color": style.COLORS[0], "linewidths": 0, "rasterized": True}
    axes.scatter(x[drawn], y[drawn], alpha=alpha, **points)
    axes.plot([low, high], [low, high], color=style.COLORS[-1], linewidth=0.8)
    log2_axis(axes, "x", low, high)
    log2_axis(axes, "y", low, high)
    axes.set_aspect("equal")
    left_out = f"\n{np.sum(~drawn):,} with an error of 0 left out" if not drawn.all() else ""
    said = f"{second} errs less in {100 * np.mean(y < x):.1f} % of {len(x):,} blocks{left_out}"
    style.label(axes, f"{label}, {first}", f"{label}, {second}", said)


def _checked(errors: Errors) -> dict[str, np.ndarray]:
    arrays = style.given("errors", errors)
    for name, values in arrays.items():
        if values.min() < 0:
            raise ValueError(f"errors of {name!r} go down to {values.min():g}: give them >= 0")
    return arrays


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
        if len(kinds) == 1:
            style.legend_below(figure, axes)  # a curve of many steps fills the axes
        else:
            style.legend(axes)
    panels[-1].set_xlabel("step", fontsize=style.LABEL_SIZE)
    if orthogonality is not None:
        panels[1].set_yscale("log")
    panels[0].set_title(title, fontsize=style.LABEL_SIZE)
    return figure


def roofline(
    peaks: Mapping[str, float],
    bandwidth: float,
    kernels: Mapping[str, tuple[float, float]],
    *,
    title: str = "",
    columns: style.Columns = 1,
) -> Figure:
    """Roofs of one memory and several units, and kernels as points below them; both axes log2.

    Args:
      peaks: Unit -> FLOP/s, e.g. {"MXFP4": 9e15, "bfloat16": 2.25e15}.
      bandwidth: Of the memory, bytes/s.
      kernels: Name -> (FLOP for each byte moved, FLOP/s reached or predicted; the name or the
        title says which).

    Raises:
      ValueError: Nothing is given, or a number is not positive.
    """
    if not peaks:
        raise ValueError("no peaks: give at least one roof")
    numbers = [*peaks.values(), bandwidth, *(v for point in kernels.values() for v in point)]
    if not all(np.isfinite(v) and v > 0 for v in numbers):
        raise ValueError("a roofline is of positive finite numbers: FLOP/s, bytes/s, FLOP/byte")
    ridges = [peak / bandwidth for peak in peaks.values()]
    intensities = np.array([*ridges, *(x for x, _ in kernels.values())])
    low, high = intensities.min() / 4, intensities.max() * 4
    reached = [bandwidth * low, *peaks.values(), *(y for _, y in kernels.values())]
    figure = style.blank(columns, 2.8)
    axes = figure.subplots()
    for name, peak, look in style.styled(peaks):
        x = np.array([low, peak / bandwidth, high])
        y = np.minimum(peak, bandwidth * x) / 1e12
        name = f"{name}: {peak / 1e12:,.0f} TFLOP/s, {bandwidth / 1e12:g} TB/s"
        axes.plot(x, y, color="#555555", linestyle=look["linestyle"], linewidth=1.2, label=name)
    for number, (name, (x, y), look) in enumerate(style.styled(kernels)):
        look = {"color": look["color"], "marker": style.MARKERS[number % len(style.MARKERS)]}
        axes.plot([x], [y / 1e12], linestyle="none", markersize=5, label=name, **look)
    log2_axis(axes, "x", low, high, most=6)
    log2_axis(axes, "y", min(reached) / 2e12, max(reached) * 2e-12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.grid(linewidth=0.3)
    style.label(axes, "FLOP per byte moved", "TFLOP/s", title)
    style.legend_below(figure, axes)
    return figure


def log2_axis(axes: Any, which: Literal["x", "y"], low: float, high: float, most: int = 7) -> None:
    """Makes an axis log2 from low to high, with at most `most` ticks."""
    getattr(axes, f"set_{which}scale")("log", base=2)
    getattr(axes, f"set_{which}lim")(low, high)
    style.log2_ticks(getattr(axes, f"{which}axis"), low, high, most)
