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
Last result, 2026-12-01 (commit 3b48c35, with attention tiled as in cc58777;
  results/grid_gptq_settings_smollm2_128rows.json),
  SmolLM2-135M, 65,408 targets of eight development books, one seed, one H200, compiled without
  trying tilings; 56 of the 96 cells, of which two, without their baseline, are not in the file. KL
  (* significant against GPTQ as it is by default; to nearest every difference is):
                        Hadamard smoothed .6   .7    wush | smoothed .5   .6     .8    wush
                            even        even  even   even |       floor floor  floor  floor
    to nearest                 -        .473     -   .337 |        .563  .507   .562   .390
    gptq                    .411        .323  .334   .282 |        .359  .402   .397   .324
    damping .1 %            .417        .326  .333   .288 |        .353  .408   .405*  .326
    damping 10 %            .415        .324  .330   .277 |        .362  .383*  .396   .311
    gptq_scale              .410        .323  .333   .279 |        .346* .390   .386*  .290*
    descent                 .401*       .321  .324*  .275*|        .349* .386*  .388*  .296*
    asymmetric_descent      .350*       .371* .381*  .310*|            - .433       -  .342
    gptq, sequential        .398*          -  .329      - |            -    -       -      -
  Half of the hypothesis holds. Under even no setting but one changes the order of Hadamard,
  smoothed Hadamard and WUSH. Under floor gptq_scale and descent gain .008 to .034, damping .02 at
  most; under even descent gains .002 to .011, the others nothing. asymmetric_descent takes .062 +-
  .009* off Hadamard and under even adds .03 to .05 to all others (.02 and .03 under floor, not
  significant; to WUSH's NLL nothing), so that Hadamard comes before what is smoothed. With GPTQ
  alpha .5 is the best of three under floor, where .6 is to nearest. Fits that are made anew move
  KL by as much as .01 (docs/reading.md): the same cells of gptq.py are within .011. Not measured:
  the order of calibration elsewhere (Hadamard .428 and alpha .7 .355 under floor are the two cells
  alone), alpha .5 and .8 under even, .7 under floor, and Hadamard under floor, which has .943 to
  nearest and .429 by GPTQ in gptq.py.
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
