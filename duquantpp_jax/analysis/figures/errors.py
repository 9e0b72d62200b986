"""Errors of blocks: how they are spread, and which of two methods does better block by block.

Errors are on log2 axes, where a step is a scale twice as large. Blocks without any error have no
place there; what they are is said in numbers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from duquantpp_jax.analysis.figures import style

ERROR = "squared error of a block"


def error_histogram(
    errors: Mapping[str, Float[Array | np.ndarray, " blocks"]],
    *,
    label: str = ERROR,
    title: str = "",
    columns: style.Columns = 1,
) -> Figure:
    """How many blocks have which error: one outline a method, bins of equal parts of an octave.

    Args:
      errors: Method -> error of each block, >= 0.
      label: What the errors are, with their unit.

    Raises:
      ValueError: No method, NaN, Inf or negative errors.
    """
    arrays = _errors(errors)
    low, high = style.powers_of_two(np.concatenate(list(arrays.values())))
    octaves = round(np.log2(high / low))
    each = next(n for n in (8, 4, 2, 1) if n * octaves <= 64 or n == 1)
    edges = low * 2.0 ** (np.arange(octaves * each + 1) / each)
    figure = style.blank(columns, 2.4)
    axes = figure.subplots()
    for name, values, look in style.one_by_one(arrays):
        counts, _ = np.histogram(values[values > 0], edges)
        axes.stairs(counts, edges, label=_with_zeros(name, values), linewidth=1.2, **look)
    _log2_x(axes, low, high)
    style.label(axes, label, "blocks", title)
    style.legend(axes)
    return figure


def error_ecdf(
    errors: Mapping[str, Float[Array | np.ndarray, " blocks"]],
    *,
    label: str = ERROR,
    title: str = "",
    columns: style.Columns = 1,
) -> Figure:
    """Which share of blocks has at most which error: F(e) = #{b: e_b <= e} / blocks.

    Args:
      errors, label: As in `error_histogram`.

    Raises:
      ValueError: As there.
    """
    arrays = _errors(errors)
    figure = style.blank(columns, 2.4)
    axes = figure.subplots()
    for name, values, look in style.one_by_one(arrays):
        steps = np.sort(values)
        share = np.arange(1, len(steps) + 1) / len(steps)
        axes.step(
            steps, share, where="post", label=_with_zeros(name, values), linewidth=1.2, **look
        )
    _log2_x(axes, *style.powers_of_two(np.concatenate(list(arrays.values()))))
    axes.set_ylim(0, 1)
    axes.grid(linewidth=0.3)
    style.label(axes, label, "share of blocks", title)
    style.legend(axes)
    return figure


def error_scatter(
    errors: Mapping[str, Float[Array | np.ndarray, " blocks"]],
    *,
    label: str = ERROR,
    title: str = "",
    columns: style.Columns = 1,
) -> Figure:
    """The same blocks under two methods, a point each; on the diagonal both err alike.

    Args:
      errors: The two methods, x axis first -> error of each block, in the same order.
      label: As in `error_histogram`.

    Raises:
      ValueError: Not two methods, not the same blocks, or as in `error_histogram`.
    """
    arrays = _errors(errors)
    if len(arrays) != 2:
        raise ValueError(f"{len(arrays)} methods: a paired scatter is of 2")
    (first, x), (second, y) = arrays.items()
    if len(x) != len(y):
        raise ValueError(
            f"{first} has {len(x)} blocks and {second} {len(y)}: give the same blocks to both"
        )
    drawn = (x > 0) & (y > 0)
    low, high = style.powers_of_two(np.concatenate([x[drawn], y[drawn]]))
    figure = style.blank(columns, style.WIDTHS[1] if columns == 1 else 4.5)
    axes = figure.subplots()
    axes.scatter(
        x[drawn], y[drawn], s=3, color=style.COLORS[0], alpha=0.3, linewidths=0, rasterized=True
    )
    axes.plot([low, high], [low, high], color=style.COLORS[-1], linewidth=0.8)
    _log2_x(axes, low, high)
    axes.set_yscale("log", base=2)
    axes.set_ylim(low, high)
    style.log2_ticks(axes.yaxis, low, high)
    axes.set_aspect("equal")
    left_out = f"; {np.sum(~drawn):,} with an error of 0 left out" if not drawn.all() else ""
    said = f"{second} errs less in {np.mean(y < x):.1%} of {len(x):,} blocks{left_out}"
    style.label(axes, f"{label}, {first}", f"{label}, {second}", f"{title}\n{said}".strip())
    return figure


def _errors(errors: Mapping[str, Float[Array | np.ndarray, " blocks"]]) -> dict[str, np.ndarray]:
    arrays = style.given("errors", errors)
    for name, values in arrays.items():
        if values.min() < 0:
            raise ValueError(f"errors of {name!r} go down to {values.min():g}: give them >= 0")
    return arrays


def _with_zeros(name: str, values: Float[np.ndarray, " blocks"]) -> str:
    zeros = int(np.sum(values == 0))
    return f"{name} ({zeros:,} blocks: 0)" if zeros else name


def _log2_x(axes: Any, low: float, high: float) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    style.log2_ticks(axes.xaxis, low, high)
