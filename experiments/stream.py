"""What are rotations worth that cost nothing online, of the residual stream and of value heads?

Hypothesis: for plain rounding these two (R1 and R2) are worth much, for they spread outliers of the
  stream over its whole width; beside a rotation of every block, which spreads them as far as a
  block's scale reaches, they add little.
Method: each recipe with neither, either and both by Hadamard matrices, and both by random ones with
  three seeds. All are compared with the float model as it is; the baseline is the recipe alone.
Command: python -m experiments.stream --table [--model DIR --text FILE --calibration-text FILE]
Cost: 42 cells; with --tokens 16352 and the embedded model 4 minutes of processor time.
Last result, 2026-11-29, the embedded model, 16,352 targets (results/grid_stream_testbed.json): less
  than nothing. KL of R1 less that of the recipe alone, floor / even, is +.0236 / +.0312 for plain
  rounding and +.0180 / +.0174 for WUSH, random or not. Why was not measured; position_zero.py shows
  what a Hadamard matrix makes of this model's one massive activation, and R1 takes it to all
  channels. R2 is level (within .0042) but for block_hadamard under even (-.0305). Sylvester's
  matrices undo one another: R1 or R2 before block_hadamard leaves each block of 32 as it was,
  H_256 (I x H_32) = H_8 x I, and both together cost +.1903 (floor; +.0446 with random signs). Not
  measured: a model with outliers in many tokens.
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
