"""Figures of stored numbers: exponents of the scales, codes of the elements."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from duquantpp_jax.analysis.figures import style
from duquantpp_jax.formats.elements import E2M1

Bytes = Mapping[str, UInt8[Array | np.ndarray, "..."]]


def scale_occupancy(scale_bytes: Bytes, *, title: str = "", columns: style.Columns = 1) -> Figure:
    """Number of blocks with each scale 2^E, E = byte - 127: a bar for every integer E.

    Args:
      scale_bytes: Method -> E8M0 byte of each block, as `MXArray.scale_bytes` gives it.

    Raises:
      ValueError: No method, an empty one, or byte 255, which is NaN.
    """
    arrays = style.given("scale bytes", scale_bytes)
    exponents = {name: array.ravel().astype(np.int64) - 127 for name, array in arrays.items()}
    low, high = (int(f(np.concatenate([*exponents.values()]))) for f in (np.min, np.max))
    if high > 127:
        raise ValueError("a scale byte is 255, which stands for NaN: give blocks of finite numbers")
    values = np.arange(low, high + 1)
    counts = {name: np.bincount(e - low, minlength=len(values)) for name, e in exponents.items()}
    figure, axes = _bars(columns, values, counts)
    ticks = values[:: -(-len(values) // 10)]
    axes.set_xticks(ticks, [style.power_of_two(float(exponent)) for exponent in ticks])
    axes.set_xlim(low - 1, high + 1)
    axes.set_yscale("log")  # shows a single block among thousands
    axes.set_ylim(bottom=0.5)
    style.label(axes, "scale of the block", "blocks", title)
    return figure


def code_occupancy(codes: Bytes, *, title: str = "", columns: style.Columns = 1) -> Figure:
    """Share of elements with each of the 16 codes of E2M1, in the order of their values.

    Args:
      codes: Method -> code of each element, as `MXArray.codes` gives it.

    Raises:
      ValueError: No method, an empty one, or a code beyond 15.
    """
    shares = {}
    order = np.r_[np.arange(15, 7, -1), np.arange(8)]
    for name, array in style.given("codes", codes).items():
        if array.max() > 15:
            raise ValueError(f"code {array.max()} of {name!r} is not one of E2M1: they end at 15")
        shares[name] = np.bincount(array.ravel(), minlength=16)[order] / array.size
    figure, axes = _bars(columns, np.arange(16), shares)
    values = [f"{value:g}" for value in np.asarray(E2M1.decode(jnp.uint8(order)))]
    axes.set_xticks(range(16), values, rotation=90 if columns == 1 else 0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    style.label(axes, "element", "share of elements", title)
    return figure


def _bars(
    columns: style.Columns, at: np.ndarray, heights: Mapping[str, np.ndarray]
) -> tuple[Figure, Any]:
    """A figure with the bars of all methods side by side around each integer."""
    figure = style.blank(columns, 2.4)
    axes = figure.subplots()
    width = 0.8 / len(heights)
    for number, (name, values, look) in enumerate(style.styled(heights)):
        offset = width * (number - (len(heights) - 1) / 2)
        hatch = style.HATCHES[number % len(style.HATCHES)]
        look = {"color": look["color"], "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        axes.bar(at + offset, values, width, **look, label=name)
    style.legend_below(figure, axes)
    return figure, axes
