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
Last result: not yet run.
"""

import sys

from duquantpp_jax.ablation import Cell
from duquantpp_jax.ablation.command import main
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
    return f"{cell.recipe.partition('+')[2]}, {cell.scale_rule}"


if __name__ == "__main__":
    main(sys.modules[__name__])
