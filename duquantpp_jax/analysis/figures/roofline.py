"""A roofline: the speed that a kernel may reach, by its operations for each byte that it moves.

    FLOP/s <= min(peak, bandwidth * FLOP/byte)

Source: Williams, Waterman and Patterson, Roofline, CACM 52(4), 2009.
"""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from duquantpp_jax.analysis.figures import style


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
    style.log2_axis(axes, "x", low, high, most=6)
    style.log2_axis(axes, "y", min(reached) / 2e12, max(reached) * 2e-12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.grid(linewidth=0.3)
    style.label(axes, "FLOP per byte moved", "TFLOP/s", title)
    style.legend_below(figure, axes)
    return figure
