"""Parts that all figures share: widths, sizes of type, colours, log2 axes and files.

Figures are made without pyplot and without global state: every size is given where it is used.
Colours are those of Okabe and Ito, which colour-blind readers can tell apart. Colour maps have even
lightness (viridis) or diverge from white (PuOr).
"""

import io
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import matplotlib
import numpy as np
from jaxtyping import Array, Float, Int64
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogFormatterMathtext, NullLocator

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (7, 1.5, 1, 1.5)))
"""Line styles; curves differ by them where colours are not printed."""
HATCHES = ("", "////", "....", "xxxx")
"""Of bars, which differ by them where colours are not printed."""
LABEL_SIZE, TICK_SIZE = 8, 7
"""Points, on paper."""
_LEGEND = {"fontsize": TICK_SIZE, "title_fontsize": TICK_SIZE, "frameon": False}

Columns = Literal[1, 2]
"""How many of a paper's two columns a figure is wide."""


def width(columns: int) -> float:
    """Width of a figure in inches; raises ValueError for other than 1 or 2 columns."""
    if columns not in (1, 2):
        raise ValueError(f"columns = {columns}: a figure is 1 or 2 columns wide")
    return 3.5 if columns == 1 else 7.2


def blank(columns: int, height: float) -> Figure:
    """An empty figure; its height is in inches."""
    return Figure(figsize=(width(columns), height), layout="constrained")


def label(axes: Any, x: str = "", y: str = "", title: str = "") -> None:
    """Sets the labels and the title of axes, in the sizes of all figures."""
    axes.set_xlabel(x, fontsize=LABEL_SIZE)
    axes.set_ylabel(y, fontsize=LABEL_SIZE)
    axes.set_title(title, fontsize=LABEL_SIZE)
    axes.tick_params(labelsize=TICK_SIZE)


def legend(axes: Any, **options: Any) -> None:
    """Draws a legend without a frame."""
    axes.legend(**_LEGEND, **options)


def legend_below(figure: Figure, axes: Any, title: str = "") -> None:
    """Draws the legend of these axes below the figure, in as many columns as fit."""
    handles, names = axes.get_legend_handles_labels()
    longest = 30 + 0.6 * TICK_SIZE * max(map(len, names), default=0)  # points, with the sample
    across = min(max(1, int(figure.get_figwidth() * 72 / longest)), len(names))
    place = "outside lower center"
    figure.legend(handles, names, loc=place, ncols=across, title=title, **_LEGEND)


def colorbar(figure: Figure, drawn: Any, panels: Iterable[Any], text: str) -> Any:
    """A colour bar beside all panels."""
    bar = figure.colorbar(drawn, ax=list(panels), pad=0.02)
    bar.set_label(text, fontsize=LABEL_SIZE)
    bar.ax.tick_params(labelsize=TICK_SIZE)
    return bar


def styled(named: Mapping[str, Any]) -> Iterable[tuple[str, Any, dict[str, Any]]]:
    """Each name and value with a colour and a line style of its own."""
    for number, (name, value) in enumerate(named.items()):
        look = {"color": COLORS[number % len(COLORS)], "linestyle": DASHES[number % len(DASHES)]}
        yield name, value, look


def given(what: str, named: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays in NumPy, checked.

    Raises:
      ValueError: There is no array, or one is empty or has NaN or Inf.
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
    """First index of each of at most `most` parts that divide `size` things evenly."""
    return np.arange(min(size, most)) * size // min(size, most)


def powers_of_two(values: Float[Array | np.ndarray, " n"]) -> tuple[float, float]:
    """The nearest two different powers of two around all positive values; 1 and 2 if none is."""
    positive = np.asarray(values, np.float64)
    positive = positive[positive > 0]
    if not positive.size:
        return 1.0, 2.0
    floors, ceilings = _exponents(positive)
    low, high = int(floors.min()), int(ceilings.max())
    return 2.0**low, 2.0 ** max(high, low + 1)


def _exponents(x: Any) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """floor(log2 x) and ceil(log2 x), exact: np.log2 rounds up just below a power of two."""
    significand, exponent = np.frexp(x)
    return exponent.astype(np.int64) - 1, exponent - np.int64(significand == 0.5)


def power_of_two(exponent: float, _: int | None = None) -> str:
    """2^exponent as the label of a tick."""
    return f"$2^{{{exponent:g}}}$"


def log2_ticks(axis: Any, low: float, high: float, most: int = 7) -> None:
    """Sets at most `most` evenly spaced ticks, all at powers of two."""
    (_, last), (first, _) = _exponents([low, high])
    step = -(-(last - first + 1) // most)
    axis.set_major_locator(FixedLocator(list(2.0 ** np.arange(first, last + 1, step))))
    axis.set_major_formatter(LogFormatterMathtext(base=2))
    axis.set_minor_locator(NullLocator())


def picture(figure: Figure, format: Literal["png", "svg", "pdf"], dpi: int = 200) -> bytes:
    """The figure as the bytes of a file: without a date; text of svg and pdf stays text.

    Args:
      dpi: Of a png, and of surfaces, heat maps and clouds of points inside svg and pdf.
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
