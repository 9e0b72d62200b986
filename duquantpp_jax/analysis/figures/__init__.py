"""Figures from arrays and results: functions that take numbers and return a matplotlib Figure.

`columns` is 1 or 2: how many of a paper's two columns the figure is wide.
"""

from duquantpp_jax.analysis.figures.codes import code_occupancy, scale_occupancy
from duquantpp_jax.analysis.figures.layers import amax_map, sqnr
from duquantpp_jax.analysis.figures.results import comparison, divergences
from duquantpp_jax.analysis.figures.style import picture
from duquantpp_jax.analysis.figures.surface import surface

__all__ = ["amax_map", "code_occupancy", "comparison", "divergences", "picture", "scale_occupancy"]
__all__ += ["sqnr", "surface"]
