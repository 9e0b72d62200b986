"""Figures of the errors of blocks: their distribution, and two methods compared block by block.

Errors are on log2 axes. Blocks without any error have no place there; labels give their number.
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
    style.log2_axis(axes, "x", *style.powers_of_two(np.concatenate([*arrays.values()])))
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
