"""The laboratory: measures a grid of frozen cells, resumes after a kill, and compares the cells.

cells = [Cell(recipe, format, seed=seed) for recipe in ... for format in ... for seed in ...]
outcome = run(cells, Path("ablate-out"))
"""

from duquantpp_jax.lab.cells import Cell
from duquantpp_jax.lab.running import Outcome, run

__all__ = ["Cell", "Outcome", "run"]
