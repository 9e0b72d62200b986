"""The ablation laboratory: a grid of frozen cells, run anywhere, killed and resumed, tabulated.

cells = [Cell(recipe, format, seed=seed) for recipe in ... for format in ... for seed in ...]
outcome = run(cells, Path("ablate-out"))
"""

from duquantpp_jax.lab.cells import Cell
from duquantpp_jax.lab.running import Outcome, run

__all__ = ["Cell", "Outcome", "run"]
