"""Does it help to permute channels before a block rotation?

Hypothesis: DuQuant++ says no (each block has its own scale), PeRQ says it is vital (a rotation
  cannot move mass between blocks). Spreading the outliers over blocks costs the blocks that had
  none, so zigzag may lose where few blocks have outliers, and help where many sit in one.
Method: no permutation, zigzag, mass-balancing or random, then no rotation or one of side 32.
Command: duquantpp ablate experiments/permutation.py --table
  or python -m experiments.permutation --table, with --model DIR --text FILE
  --calibration-text FILE for another model than the embedded one.
Cost: 60 cells. Online, a permutation that cannot be fused is a gather.
Last result, 2026-11-25 (commit bf5fc7c), 65,408 targets, H100s (results/grid_permutation_*.json),
  KL less that without a permutation, floor / even; gutenberg-27m on Gutenberg, on WikiText-2; the
  embedded model:
    zigzag, no rotation          +.0035 / +.0014    +.0106 / +.0046    +.0044 / +.0011
    zigzag, hadamard             -.0013 / -.0002    +.0042 / -.0004    -.0032 / (position 0)
    random, hadamard             -.0040 / -.0018    -.0028 / -.0005    -.0009 / (position 0)
    mass, hadamard               -.0013 / +.0001    +.0284 / +.0215    +.0005 / (position 0)
    zigzag, smooth_hadamard      -.0045 / -.0019    -.0118 / -.0044    -.0052 / -.0039
    zigzag, greedy               -.0025 / -.0033    -.0049 / -.0014    +.0110 / +.0149
  with 95 % intervals of +- .001 to .003. Neither needless nor vital. Zigzag is worth .002 to .005
  where smoothing has been before it, everywhere; elsewhere a permutation gains no more than a
  random one does. Balancing mass does harm on text of another kind: what it balanced was the
  calibration text's. In the column of Hadamard under even the embedded model has its accident of
  position 0 (position_zero.py), which any permutation undoes (-.021 to -.028).
  On SmolLM2-135M (2026-11-29, 8 development books, H200s), floor / even, * significant: zigzag
  -.061* / -.075* without a rotation, +.029 / -.026 before hadamard, -.022* / -.036* before
  smooth_hadamard, +.009 / +.033 before greedy; mass -.031 / -.115*, -.025* / -.043*, -.025* /
  -.025*, -.050 / +.032. Zigzag or mass is worth 4 to 8 % of smoothed Hadamard's KL.
"""

import sys

from duquantpp_jax.commands.ablate import main
from duquantpp_jax.lab import Cell
from duquantpp_jax.recipes import FITS
from duquantpp_jax.transforms.basic import FitInTurn
from duquantpp_jax.transforms.permutation import FitPermutation
from experiments.seeding import seeded

ROTATIONS = {
    "none": FITS["rtn"],
    "hadamard": FITS["block_hadamard"],
    "smooth_hadamard": FITS["smooth_hadamard"],
    "greedy": FITS["greedy"],
}
PERMUTATIONS = ("none", "zigzag", "mass", "random")


def _fit(permutation: str, rotation: str):
    fit = ROTATIONS[rotation]
    # Smoothing comes first in FITS; a permutation before or after it is the same map.
    return fit if permutation == "none" else FitInTurn((FitPermutation(permutation), fit))


CELLS = [
    cell
    for permutation in PERMUTATIONS
    for rotation in ROTATIONS
    for rule in ("floor", "even")
    for cell in seeded(Cell(f"{permutation}+{rotation}", rule, fit=_fit(permutation, rotation)))
]
BASELINE = "none"


def ROWS(cell: Cell) -> str:
    """The permutation."""
    return cell.recipe.partition("+")[0]


def COLUMNS(cell: Cell) -> str:
    """The rotation and the scale rule."""
    return f"{cell.recipe.partition('+')[2]}, {cell.format}"


if __name__ == "__main__":
    main(sys.modules[__name__])
