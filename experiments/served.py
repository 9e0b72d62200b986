"""What does it cost to round weights under one scale rule and activations under another?

Hypothesis: little. Weights are stored as codes and scales, so a runtime's rule reaches activations
  alone; each side has its own best rule, and the best of weights is not the best of activations.
Method: every pair of five rules, weights rounded to nearest and by GPTQ, after two transforms that
  do not look at the format. The baseline is floor weights with floor activations.
Command: duquantpp ablate experiments/served.py --table
  or python -m experiments.served --table, with --model DIR --text FILE --calibration-text FILE for
  another model than the embedded one.
Cost: 100 cells.
Last result: none yet.
"""

import sys

from duquantpp_jax.commands.ablate import main
from duquantpp_jax.lab import Cell

RULES = ("floor", "ceil", "even", "rceil", "mse")
RECIPES = ("block_hadamard", "wush")
CELLS = [
    Cell(recipe, weight_format=weight, activation_format=activation, rounding=rounding)
    for recipe in RECIPES
    for rounding in ("rtn", "gptq")
    for weight in RULES
    for activation in RULES
]
BASELINE = "floor, floor"


def ROWS(cell: Cell) -> str:
    """The rule of weights and that of activations."""
    return f"{cell.weight_format}, {cell.activation_format}"


def COLUMNS(cell: Cell) -> str:
    """The recipe and how weights are rounded."""
    return f"{cell.recipe}, {cell.rounding}"


if __name__ == "__main__":
    main(sys.modules[__name__])
