"""Does what is set for GPTQ, or what takes its place, level the transforms?

Hypothesis: no. Damping, the order of calibration and relatives of GPTQ move all transforms alike,
  and the alpha that is best with weights to nearest is best with GPTQ.
Method: a column is a transform under one rule, smoothed Hadamard once for each alpha; a row is how
  weights are rounded. `sequential` calibrates each layer on what the quantized layers before it
  give. The baseline is GPTQ as it is by default, damping 1 %, so that a difference is the row's own
  at one transform; across columns read the values.
Command: duquantpp ablate experiments/gptq_settings.py --table
  or python -m experiments.gptq_settings --table, with --model DIR --text FILE --calibration-text
  FILE for another model than the embedded one.
Cost: 96 cells, most with a second calibration.
Last result: not run.
"""

import dataclasses
import sys

from duquantpp_jax.commands.ablate import main
from duquantpp_jax.core import Fit
from duquantpp_jax.lab import Cell
from duquantpp_jax.recipes import FITS
from duquantpp_jax.rounding.gptq import GPTQ
from duquantpp_jax.transforms.basic import FitInTurn, FitSmooth
from duquantpp_jax.transforms.hadamard import FitHadamard

ALPHAS = (0.5, 0.6, 0.7, 0.8)
TRANSFORMS: dict[str, Fit] = {
    "block_hadamard": FITS["block_hadamard"],
    **{f"smoothed {a:g}": FitInTurn((FitSmooth(a), FitHadamard())) for a in ALPHAS},
    "wush": FITS["wush"],
}
ROUNDINGS = {
    "to nearest": "rtn",
    "gptq": "gptq",
    "gptq, damping .1 %": GPTQ(damping=0.001),
    "gptq, damping 10 %": GPTQ(damping=0.1),
    "gptq_scale": "gptq_scale",
    "descent": "descent",
    "asymmetric_descent": "asymmetric_descent",
}
BASELINE = "gptq"
_ROW = {rounding: row for row, rounding in ROUNDINGS.items()}
_AT_ONCE = [
    Cell(name, rule, fit=fit, rounding=rounding)
    for rule in ("floor", "even")
    for name, fit in TRANSFORMS.items()
    for rounding in ROUNDINGS.values()
]
CELLS = [
    *_AT_ONCE,
    *(dataclasses.replace(c, sequential=True) for c in _AT_ONCE if c.rounding == BASELINE),
]


def ROWS(cell: Cell) -> str:
    """How weights are rounded."""
    return _ROW[cell.rounding] + (", sequential" if cell.sequential else "")


def COLUMNS(cell: Cell) -> str:
    """The transform and the scale rule."""
    return f"{cell.recipe}, {cell.format}"


if __name__ == "__main__":
    main(sys.modules[__name__])
