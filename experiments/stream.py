"""What are rotations worth that cost nothing online, of the residual stream and of value heads?

Hypothesis: for plain rounding these two (R1 and R2) are worth much, for they spread outliers of the
  stream over its whole width; beside a rotation of every block, which spreads them as far as a
  block's scale reaches, they add little.
Method: each recipe with neither, either and both by Hadamard matrices, and both by random ones with
  three seeds. All are compared with the float model as it is; the baseline is the recipe alone.
Command: python -m experiments.stream --table [--model DIR --text FILE --calibration-text FILE]
Cost: 42 cells; with --tokens 16352 and the embedded model 4 minutes of processor time.
Last result, 2026-11-29 (results/grid_stream_*.json): R1 does harm, more where a model has more
  outliers; R2 gains little. KL less that of the recipe alone, floor / even:
                          the embedded model, 16,352     SmolLM2-135M, 65,408 targets
    R1, rtn               +.0236 / +.0312                +.377 / +.574
    R1, block_hadamard    +.0619 / +.0340                +.710 / +.708
    R1, wush              +.0180 / +.0174                +.503 / +.588
    R2, rtn               +.0036 / +.0042                -.054 / -.022
    R2, wush              -.0008 / -.0025                -.018 / -.004 (not significant)
  Random signs make R1 no better. A likely cause, not isolated: with the norms' gains folded into
  weights first, the input that is rotated is the normalized stream without the gains that damp its
  largest channels, and R1 takes these to all channels, so that every block is scaled by them.
  Sylvester's matrices undo one another: R1 or R2 before block_hadamard leaves each block of 32 as
  it was, H_256 (I x H_32) = H_8 x I. SmolLM2 is the file of experiments/headline.py, on the same
  text; one H200, five minutes. Other block sizes and integer formats were not measured.
"""

import sys

from duquantpp_jax.commands.ablate import main
from duquantpp_jax.lab import Cell
from experiments.seeding import seeded

BASELINE = "alone"
TURNS = {
    BASELINE: (None, None),
    "R1": ("hadamard", None),
    "R2": (None, "hadamard"),
    "R1 and R2": ("hadamard", "hadamard"),
    "R1 and R2, random": ("random_hadamard", "random_hadamard"),
}

CELLS = [
    cell
    for name in ("rtn", "block_hadamard", "wush")
    for rule in ("floor", "even")
    for stream, values in TURNS.values()
    for cell in seeded(Cell(name, rule, rotate_stream=stream, rotate_values=values))
]


def ROWS(cell: Cell) -> str:
    """The rotations that cost nothing online."""
    turned = (cell.rotate_stream, cell.rotate_values)
    return next(row for row, turn in TURNS.items() if turn == turned)


def COLUMNS(cell: Cell) -> str:
    """The recipe and the scale rule."""
    return f"{cell.recipe}, {cell.format}"


if __name__ == "__main__":
    main(sys.modules[__name__])
