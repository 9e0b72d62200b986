"""Errors of blocks: how they are spread, and which of two methods does better block by block.

Errors are on log2 axes, where a step is a scale twice as large. Blocks without any error have no
place there; how many there are is said in numbers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from duquantpp_jax.analysis.figures import style

ERROR = "squared error of a block"

Errors = Mapping[str, Float[Array | np.ndarray, " blocks"]]
"""Method -> error of each block, >= 0."""


def error_histogram(
    errors: Errors, *, label: str = ERROR, title: str = "", columns: style.Columns = 1
) -> Figure:
    """How many blocks have which error: one outline a method, bins of equal parts of an octave.

    Args:
      errors: Method -> error of each block, >= 0.
      label: What the errors are, with their unit.

    Raises:
      ValueError: No method, NaN, Inf or negative errors.
    """
    arrays = _checked(errors)
    low, high = _limits(arrays)
    octaves = round(np.log2(high / low))
    each = next(n for n in (8, 4, 2, 1) if n * octaves <= 64 or n == 1)
    edges = low * 2.0 ** (np.arange(octaves * each + 1) / each)
    figure = style.blank(columns, 2.4)
    axes = figure.subplots()
    for name, values, look in style.one_by_one(arrays):
        counts, _ = np.histogram(values[values > 0], edges)
        axes.stairs(counts, edges, label=_with_zeros(name, values), linewidth=1.2, **look)
    style.log2_axis(axes, "x", low, high)
    style.label(axes, label, "blocks", title)
    style.legend_below(figure, axes)
    return figure


def error_ecdf(
    errors: Errors, *, label: str = ERROR, title: str = "", columns: style.Columns = 1
) -> Figure:
    """Which share of blocks has at most which error: F(e) = #{b: e_b <= e} / blocks.

    Args:
      errors, label: As in `error_histogram`.

    Raises:
      ValueError: As there.
    """
    arrays = _checked(errors)
    figure = style.blank(columns, 2.4)
    axes = figure.subplots()
    _ecdf(axes, arrays, label)
    axes.set_title(title, fontsize=style.LABEL_SIZE)
    style.legend_below(figure, axes)
    return figure


def error_scatter(
    errors: Errors, *, label: str = ERROR, title: str = "", columns: style.Columns = 1
) -> Figure:
    """The same blocks under two methods, a point each; on the diagonal both err alike.

    Args:
      errors: The two methods, x axis first -> error of each block, in the same order.
      label: As in `error_histogram`.

    Raises:
      ValueError: Not two methods, not the same blocks, or as in `error_histogram`.
    """
    arrays = _checked(errors)
    figure = style.blank(columns, 3.6 if columns == 1 else 4.6)
    axes = figure.subplots()
    _scatter(axes, arrays, label)
    figure.suptitle(title, fontsize=style.LABEL_SIZE)
    return figure


def block_errors(
    errors: Errors, pair: tuple[str, str], *, label: str = ERROR, title: str = ""
) -> Figure:
    """`error_ecdf` of all methods beside `error_scatter` of two of them, across two columns.

    Args:
      errors, label: As in `error_histogram`.
      pair: The two, x axis first.

    Raises:
      ValueError: As in `error_scatter`, or `pair` names a method that is not there.
    """
    arrays = _checked(errors)
    for name in pair:
        if name not in arrays:
            raise ValueError(f"{name!r} is not among {', '.join(arrays)}: pair two of them")
    figure = style.blank(2, 3.3)
    left, right = figure.subplots(1, 2)
    _ecdf(left, arrays, label)
    style.legend(left)
    _scatter(right, {name: arrays[name] for name in pair}, label)
    figure.suptitle(title, fontsize=style.LABEL_SIZE)
    return figure


def _ecdf(axes: Any, arrays: dict[str, np.ndarray], label: str) -> None:
    for name, values, look in style.one_by_one(arrays):
        steps, share = np.sort(values), np.arange(1, len(values) + 1) / len(values)
        name = _with_zeros(name, values)
        axes.step(steps, share, where="post", label=name, linewidth=1.2, **look)
    style.log2_axis(axes, "x", *_limits(arrays))
    axes.set_ylim(0, 1)
    axes.grid(linewidth=0.3)
    style.label(axes, label, "share of blocks")


def _scatter(axes: Any, arrays: dict[str, np.ndarray], label: str) -> None:
    if len(arrays) != 2:
        raise ValueError(f"{len(arrays)} methods: a paired scatter is of 2")
    (first, x), (second, y) = arrays.items()
    if len(x) != len(y):
        raise ValueError(
            f"{first} has {len(x)} blocks and {second} {len(y)}: give the same blocks to both"
        )
    drawn = (x > 0) & (y > 0)
    low, high = _limits({first: x[drawn], second: y[drawn]})
    axes.scatter(
        x[drawn],
        y[drawn],
        s=2,
        color=style.COLORS[0],
        alpha=float(np.clip(4000 / len(x), 0.25, 0.7)),  # a point alone has to be seen, too
        linewidths=0,
        rasterized=True,
    )
    axes.plot([low, high], [low, high], color=style.COLORS[-1], linewidth=0.8)
    style.log2_axis(axes, "x", low, high)
    style.log2_axis(axes, "y", low, high)
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


def _limits(arrays: dict[str, np.ndarray]) -> tuple[float, float]:
    return style.powers_of_two(np.concatenate(list(arrays.values())))


def _with_zeros(name: str, values: Float[np.ndarray, " blocks"]) -> str:
    zeros = int(np.sum(values == 0))
    return f"{name} ({zeros:,} without error)" if zeros else name
