"""Figures from arrays and results: functions that take numbers and return a matplotlib Figure.

    surface                         |X| over tokens and channels, before and after
    amax_map, sqnr                  over the layers of a model
    error_ecdf, block_errors        errors of blocks
    scale_occupancy, code_occupancy what is stored
    comparison, divergences         results of `compare` and of grids
    rotation, loss_curves           a rotation, and its learning
    roofline                        what kernels may reach
    picture                         a figure as the bytes of a png, svg or pdf

`columns` is 1 or 2: how many of a paper's two columns the figure is wide.
"""

from duquantpp_jax.analysis.figures.codes import code_occupancy, scale_occupancy
from duquantpp_jax.analysis.figures.errors import block_errors, error_ecdf
from duquantpp_jax.analysis.figures.layers import amax_map, sqnr
from duquantpp_jax.analysis.figures.results import comparison, divergences
from duquantpp_jax.analysis.figures.roofline import roofline
from duquantpp_jax.analysis.figures.rotations import loss_curves, rotation
from duquantpp_jax.analysis.figures.style import picture
from duquantpp_jax.analysis.figures.surface import surface

__all__ = [
    "amax_map",
    "block_errors",
    "code_occupancy",
    "comparison",
    "divergences",
    "error_ecdf",
    "loss_curves",
    "picture",
    "roofline",
    "rotation",
    "scale_occupancy",
    "sqnr",
    "surface",
]
