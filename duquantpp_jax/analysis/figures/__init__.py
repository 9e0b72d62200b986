"""Figures from arrays and results: functions that take numbers and return a matplotlib Figure.

    surface                         |X| over tokens and channels, before and after
    amax_map, sqnr                  over the layers of a model
    scale_occupancy, code_occupancy what is stored
    comparison, divergences         results of `compare` and of grids
    picture                         a figure as the bytes of a png, svg or pdf

`columns` is 1 or 2: how many of a paper's two columns the figure is wide.
"""

from duquantpp_jax.analysis.figures.codes import code_occupancy, scale_occupancy
from duquantpp_jax.analysis.figures.layers import amax_map, sqnr
from duquantpp_jax.analysis.figures.results import comparison, divergences
from duquantpp_jax.analysis.figures.style import picture
from duquantpp_jax.analysis.figures.surface import surface

__all__ = [
    "amax_map",
    "code_occupancy",
    "comparison",
    "divergences",
    "picture",
    "scale_occupancy",
    "sqnr",
    "surface",
]
