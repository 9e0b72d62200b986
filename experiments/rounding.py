"""By how much does GPTQ lower the KL of a recipe, and how surely?

Hypothesis: for every recipe, under both rules; by more where the weights are what limits (block
  Hadamard) than where the activations are (plain rounding).
Method: each recipe with weights rounded to nearest and by GPTQ (Hessian from the float model's
  activations, moved and quantized, damping 1 %), the same seed for both. A column is one recipe
  under one rule and the baseline its rounding to nearest, so that a difference is that of the
  rounding alone, row by row of the text. `gptq.py` compares recipes with each other.
Command: duquantpp ablate experiments/rounding.py --table
  or python -m experiments.rounding --table, with --model DIR --text FILE --calibration-text FILE
  for another model than the embedded one.
Cost: 20 cells, half of them with a second calibration; 27 minutes on 2 CPU cores that also did
  other work.
Last result, 2026-11-25, gutenberg-27m, 65,408 targets, seed 0, jax 0.12.0.1 on 2 CPU cores
  (results/grid_rounding_gutenberg27m_128rows.json): lower for every recipe under both rules. Most
  for block_hadamard, -.0219 +- .0016 (floor) and -.0177 +- .0015 (even); least for
  duquantpp_released under even, -.0091 +- .0014. The second half of the hypothesis holds for block
  Hadamard alone: smoothed recipes gain as much as plain rounding does.
"""

import sys

from duquantpp_jax.commands.ablate import main
from duquantpp_jax.lab import Cell

RECIPES = ("identity", "block_hadamard", "smooth_hadamard", "duquantpp", "duquantpp_released")
CELLS = [
    Cell(recipe, rule, rounding=rounding)
    for recipe in RECIPES
    for rule in ("floor", "even")
    for rounding in ("rtn", "gptq")
]
BASELINE = "rtn"


def ROWS(cell: Cell) -> str:
    """How weights are rounded."""
    return cell.rounding


def COLUMNS(cell: Cell) -> str:
    """The recipe and the scale rule."""
    return f"{cell.recipe}, {cell.format}"


if __name__ == "__main__":
    main(sys.modules[__name__])
