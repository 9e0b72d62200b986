"""Figures from arrays and results: functions that take numbers and return a matplotlib Figure.

    surface                                |X| over tokens and channels, before and after
    amax_map, sqnr                         over the layers of a model
    block_errors, error_*                  errors of blocks
    scale_exponents, code_occupancy        what is stored
    comparison, divergences, channels      results of `compare` and of grids
    rotation, training                     a rotation, and its learning
    roofline                               what kernels may reach
    picture                                any of them as bytes of a png, svg or pdf

All take `columns`, 1 or 2: how many of a paper's two columns the figure is wide.
"""

from duquantpp_jax.analysis.figures.codes import code_occupancy, scale_exponents
from duquantpp_jax.analysis.figures.errors import (
    block_errors,
    error_ecdf,
    error_histogram,
    error_scatter,
)
from duquantpp_jax.analysis.figures.layers import amax_map, sqnr
from duquantpp_jax.analysis.figures.results import channels, comparison, divergences
from duquantpp_jax.analysis.figures.roofline import roofline
from duquantpp_jax.analysis.figures.rotations import rotation, training
from duquantpp_jax.analysis.figures.style import picture
from duquantpp_jax.analysis.figures.surface import surface

__all__ = [
    "amax_map",
    "block_errors",
    "channels",
    "code_occupancy",
    "comparison",
    "divergences",
    "error_ecdf",
    "error_histogram",
    "error_scatter",
    "picture",
    "roofline",
    "rotation",
    "scale_exponents",
    "sqnr",
    "surface",
    "training",
]
