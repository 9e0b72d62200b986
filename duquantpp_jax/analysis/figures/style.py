"""What all figures share: widths of a paper's columns, sizes of type, colours, log2 axes, files.

No global state: figures are made without pyplot, and every size is given where something is drawn.
Colours are Okabe and Ito's, which colour-blind readers can tell apart; colour maps run evenly in
lightness (viridis) or to both sides of white (PuOr).
"""

import io
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, cast

import matplotlib
import numpy as np
from jaxtyping import Array, Float, Int64
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogFormatterMathtext, NullLocator

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
DASHES = ("-", (0, (4, 2)), (2, (4, 2)), (0, (1, 1.5)))
"""Line styles, so that of lines on top of each other both are seen."""
LABEL_SIZE, TICK_SIZE = 8, 7
"""Points, on paper."""

Columns = Literal[1, 2]
"""How many of a paper's two columns a figure is wide."""

V = TypeVar("V")


def width(columns: int) -> float:
    """Inches of a figure that is 1 or 2 columns of a paper wide.

    Raises:
      ValueError: Another number of columns.
    """
    if columns not in (1, 2):
        raise ValueError(f"columns = {columns}: a figure is 1 or 2 columns wide")
    return 3.5 if columns == 1 else 7.2


def blank(columns: int, height: float) -> Figure:
    """An empty figure, its height in inches.

    Raises:
      ValueError: As `width`.
    """
    return Figure(figsize=(width(columns), height), layout="constrained")


def label(axes: Any, x: str = "", y: str = "", title: str = "") -> None:
    """Labels in the sizes of all figures."""
    axes.set_xlabel(x, fontsize=LABEL_SIZE)
    axes.set_ylabel(y, fontsize=LABEL_SIZE)
    axes.set_title(title, fontsize=LABEL_SIZE)
    axes.tick_params(labelsize=TICK_SIZE)


def legend(axes: Any, **options: Any) -> None:
    """A legend without a frame."""
    axes.legend(fontsize=TICK_SIZE, title_fontsize=TICK_SIZE, frameon=False, **options)


def legend_below(figure: Figure, axes: Any, **options: Any) -> None:
    """One legend for all axes, below them, where it hides nothing; in as many columns as fit."""
    handles, names = axes.get_legend_handles_labels()
    longest = 30 + 0.6 * TICK_SIZE * max(map(len, names), default=0)  # points, the sample included
    across = max(1, int(figure.get_figwidth() * 72 / longest))
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=min(across, len(names)),
        fontsize=TICK_SIZE,
        title_fontsize=TICK_SIZE,
        frameon=False,
        **options,
    )


def colorbar(figure: Figure, drawn: Any, panels: Iterable[Any], text: str) -> Any:
    """A bar of colours beside all panels; returns it."""
    bar = figure.colorbar(drawn, ax=list(panels), pad=0.02)
    bar.set_label(text, fontsize=LABEL_SIZE)
    bar.ax.tick_params(labelsize=TICK_SIZE)
    return bar


def one_by_one(named: Mapping[str, V]) -> Iterable[tuple[str, V, dict[str, Any]]]:
    """Name, value, and a colour and dashes of its own, for each of what is drawn in one axes."""
    for number, (name, value) in enumerate(named.items()):
        look = {"color": COLORS[number % len(COLORS)], "linestyle": DASHES[number % len(DASHES)]}
        yield name, value, look


def given(what: str, named: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays as NumPy has them.

    Raises:
      ValueError: There is none, or one is empty or has NaN or Inf.
    """
    arrays = {name: np.asarray(array) for name, array in named.items()}
    if not arrays:
        raise ValueError(f"no {what} to draw: give at least one")
    for name, array in arrays.items():
        if not array.size:
            raise ValueError(f"{what} of {name!r} are empty: give at least one number")
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{what} of {name!r} have NaN or Inf: only finite numbers are drawn")
    return arrays


def starts(size: int, most: int) -> Int64[np.ndarray, " parts"]:
    """Where the parts begin that divide `size` things as evenly as can be, into at most `most`."""
    return np.arange(min(size, most)) * size // min(size, most)


def powers_of_two(values: Float[Array | np.ndarray, " n"]) -> tuple[float, float]:
    """The nearest powers of two around all positive values (1 and 2 where there are none).

    They differ, so that they serve as limits of an axis.
    """
    positive = np.asarray(values, np.float64)
    positive = positive[positive > 0]
    if not positive.size:
        return 1.0, 2.0
    low, high = _floor_log2(positive.min()), _ceil_log2(positive.max())
    return 2.0**low, 2.0 ** max(high, low + 1)


def _floor_log2(x: float) -> int:
    return int(np.frexp(x)[1]) - 1  # exact: np.log2 rounds just below a power of two to it


def _ceil_log2(x: float) -> int:
    significand, exponent = np.frexp(x)
    return int(exponent) - int(significand == 0.5)


def power_of_two(exponent: float, _: int | None = None) -> str:
    """2^exponent as the label of a tick."""
    return f"$2^{{{exponent:g}}}$"


def log2_axis(axes: Any, which: Literal["x", "y"], low: float, high: float, most: int = 7) -> None:
    """A log2 axis between two numbers, with at most so many ticks."""
    getattr(axes, f"set_{which}scale")("log", base=2)
    getattr(axes, f"set_{which}lim")(low, high)
    log2_ticks(getattr(axes, f"{which}axis"), low, high, most)


def log2_ticks(axis: Any, low: float, high: float, most: int = 7) -> None:
    """Ticks at powers of two alone, evenly spaced, at most so many."""
    first, last = _ceil_log2(low), _floor_log2(high)
    step = -(-(last - first + 1) // most)
    axis.set_major_locator(FixedLocator(list(2.0 ** np.arange(first, last + 1, step))))
    axis.set_major_formatter(LogFormatterMathtext(base=2))
    axis.set_minor_locator(NullLocator())


def picture(figure: Figure, format: Literal["png", "svg", "pdf"], dpi: int = 200) -> bytes:
    """The figure as a file's bytes: without a date, text of svg and pdf kept as text.

    Args:
      dpi: Of a png, and of surfaces, heat maps and clouds of points inside the others.
    """
    unstamped = {
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    }
    settings = {"svg.fonttype": "none", "svg.hashsalt": "figure", "pdf.fonttype": 42}
    written = io.BytesIO()
    with matplotlib.rc_context(cast(Any, settings)):
        figure.savefig(written, format=format, dpi=dpi, metadata=unstamped[format])
    return written.getvalue()
