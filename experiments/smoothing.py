"""How much of DuQuant++ is smoothing, and how strong should it be?

Hypothesis: most of it. Without rotation smoothing does little under power-of-two scales; with one
  it is worth more than the choice among rotations, at an alpha near the 0.6 of the released code.
Method: no smoothing, or alpha from 0 (by the weights alone) to 1 (by the activations alone), before
  each rotation; the baseline is the same rotation without smoothing.
Command: duquantpp ablate experiments/smoothing.py --table
  or python -m experiments.smoothing --table, with --model DIR --text FILE --calibration-text FILE
  for another model than the embedded one; with --text FILE FILE a table for each text, since what
  smoothing gains need not transfer.
Cost: 120 cells, of which alpha compiles nothing anew.
Last result, 2026-11-25 (commit bf5fc7c), 65,408 targets, H100s (results/grid_smoothing_*.json), KL
  at alpha .6 less that without smoothing, floor / even; gutenberg-27m on Gutenberg, on WikiText-2;
  the embedded model:
    none        -.0017 / -.0038    +.0150 / +.0085    -.0001 / -.0038
    hadamard    -.0038 / -.0052    +.0052 / -.0059    -.0087 / (position 0)
    greedy      -.0049 / -.0070    -.0069 / -.0083    -.0102 / -.0127
    wush        +.0001 / +.0008    +.0014 / +.0020    -.0006 / +.0020
  with 95 % intervals of +- .001 to .002. The hypothesis holds: greedy search alone is level with
  block Hadamard (+.0006 / +.0030, on gutenberg-27m), so all that DuQuant++ gains is smoothing's.
  The best alpha is .6 to .7 with every rotation and on both models; at .3 and below it does harm
  (alpha 0 doubles the KL of rotated models). WUSH has smoothing in it and gains nothing. On
  WikiText-2 under floor smoothing calibrated on books loses without a rotation and with Hadamard.
  On SmolLM2-135M (2026-11-29, 8 development books, H200s) the same, ten times as large: at alpha .7
  -.118 / -.336 without a rotation, -.450 / -.480 with Hadamard, -.463 / -.435 with greedy, -.012 /
  -.003 with WUSH. With Hadamard and greedy alpha .7 is best (.6 is within .03), and .15 and less
  multiply the KL by 2 to 7; without a rotation .45 is best under floor (-.336).
"""

import sys

from duquantpp_jax.commands.ablate import main
from duquantpp_jax.lab import Cell
from duquantpp_jax.recipes import FITS
from duquantpp_jax.transforms.basic import FitInTurn, FitSmooth
from experiments.seeding import seeded

ROTATIONS = {
    "none": FITS["rtn"],
    "hadamard": FITS["block_hadamard"],
    "greedy": FITS["greedy"],
    "wush": FITS["wush"],
}
ALPHAS = (None, 0.0, 0.15, 0.3, 0.45, 0.5, 0.6, 0.7, 0.85, 1.0)


def _name(alpha: float | None) -> str:
    return "no smoothing" if alpha is None else f"alpha {alpha:g}"


CELLS = [
    cell
    for alpha in ALPHAS
    for rotation, fit in ROTATIONS.items()
    for rule in ("floor", "even")
    for cell in seeded(
        Cell(
            f"{_name(alpha)}+{rotation}",
            rule,
            fit=fit if alpha is None else FitInTurn((FitSmooth(alpha=alpha), fit)),
        )
    )
]
BASELINE = "no smoothing"


def ROWS(cell: Cell) -> str:
    """The strength of smoothing."""
    return cell.recipe.partition("+")[0]


def COLUMNS(cell: Cell) -> str:
    """The rotation and the scale rule."""
    return f"{cell.recipe.partition('+')[2]}, {cell.format}"


if __name__ == "__main__":
    main(sys.modules[__name__])
