"""Does GPTQ erase the difference between rotations?

Hypothesis: mostly. GPTQ makes good what rounding a weight does to the output; what a transform does
  for the activations remains.
Method: every transform with weights rounded to nearest and by GPTQ (Hessian from the float model's
  activations, moved and quantized, damping 1 %).
Command: duquantpp ablate experiments/gptq.py --table
  or python -m experiments.gptq --table, with --model DIR --text FILE --calibration-text FILE for
  another model than the embedded one.
Cost: 80 cells, half of them with a second calibration.
Last result, 2026-11-25 (commit bf5fc7c), 65,408 targets, H100s (results/grid_gptq_*.json), KL less
  that of block_hadamard with the same rounding, floor / even, gutenberg-27m:
                          to nearest           GPTQ                 GPTQ, on WikiText-2
    rtn                   +.0199 / +.0166      +.0283 / +.0224      +.0483 / +.0321
    haar                  +.0053 / +.0078      +.0079 / +.0088      +.0146 / +.0160
    smooth_hadamard       -.0038 / -.0052      +.0025 / +.0003      +.0063 / +.0102
    greedy                +.0006 / +.0030      +.0015 / +.0034      +.0048 / +.0057
    duquantpp             -.0042 / -.0040      +.0042 / +.0031      +.0142 / +.0069
    duquantpp_released    -.0027 / -.0036      +.0052 / +.0030      +.0154 / +.0123
    wush                  -.0102 / -.0107      +.0003 / -.0024      +.0096 / +.0068
  with 95 % intervals of +- .001 to .003. More than the hypothesis says: GPTQ does not erase the
  differences, it turns them round. What gained by smoothing, DuQuant++ included, is behind block
  Hadamard once GPTQ rounds the weights; only WUSH under even stays ahead, and on WikiText-2 nothing
  does. Having no rotation costs more with GPTQ than without. On the embedded model all but rtn,
  smooth and haar are within .005 of block_hadamard.
  On SmolLM2-135M (2026-11-29, 8 development books, H200s) the hypothesis holds; WUSH stays ahead,
  Hadamard behind what is smoothed: with GPTQ, floor / even, rtn +.502 / +.500, smooth_hadamard
  -.028 / -.089, duquantpp -.028 (not significant) / -.033, duquantpp_released -.066 / -.069, wush
  -.107 / -.133; to nearest +.419 / +.158, -.441 / -.452, -.415 / -.455, -.410 / -.448, -.553 /
  -.594.
"""

import sys

from duquantpp_jax.commands.ablate import main
from duquantpp_jax.lab import Cell
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
    return f"{cell.rounding}, {cell.format}"


if __name__ == "__main__":
    main(sys.modules[__name__])
