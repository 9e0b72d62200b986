"""Does GPTQ erase the difference between rotations?

Hypothesis: mostly. GPTQ makes good what rounding a weight does to the output; what a transform does
  for the activations remains.
Method: every transform with weights rounded to nearest and by GPTQ (Hessian from the float model's
  activations, moved and quantized, damping 1 %).
Command: duquantpp ablate experiments/gptq.py --table
  or python -m experiments.gptq --table, with --model DIR --text FILE --calibration-text FILE for
  another model than the embedded one.
Cost: 80 cells, half of them with a second calibration.
Last result: not yet run.
"""

import sys

from duquantpp_jax.ablation import Cell
from duquantpp_jax.ablation.command import main
from experiments.seeding import seeded

RECIPES = (
    "rtn",
    "block_hadamard",
    "random_hadamard",
    "haar",
    "smooth",
    "smooth_hadamard",
    "greedy",
    "duquantpp",
    "duquantpp_released",
    "wush",
)
CELLS = [
    cell
    for recipe in RECIPES
    for rounding in ("rtn", "gptq")
    for rule in ("floor", "even")
    for cell in seeded(Cell(recipe, rule, rounding=rounding))
]
BASELINE = "block_hadamard"


def COLUMNS(cell: Cell) -> str:
    """How weights are rounded, and the scale rule."""
    return f"{cell.rounding}, {cell.scale_rule}"


if __name__ == "__main__":
    main(sys.modules[__name__])
