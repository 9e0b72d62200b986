"""Once weights are learned, does the transform before them matter?

Weights are learned through the whole model, by KL, under a transform that stays as it was fitted
from calibration, in as many steps and at one rate; `affine` moves its transform along with them.
Hypothesis: it does on a model with many outliers, and what is ahead with weights to nearest stays
  ahead, by less and less with more steps.
Command: for each START of STARTS and each number of STEPS
    duquantpp learn --start START --moves weights --steps STEPS --rate 3e-3 --text TRAIN \\
      --rows 19264 --held-out 64 --formats floor --model smollm2 --out FITS/START_STEPS
  (for affine --start wush_conditioned --moves affine weights --rate 1e-3), and then
    duquantpp ablate experiments/learned_weights.py --table --model smollm2 --data FITS \\
      --calibration-text gutenberg_calibration.txt --text DEVELOPMENT
  with the texts of docs/protocol.md. What FITS does not hold is left out.
Cost: two minutes a fit of 400 steps on one H200, five one of 1,600; a cell five seconds.
Last result, 2026-11-30 (commit 6353ac3; results/grid_learned_weights_smollm2_128rows.json),
  SmolLM2-135M, 65,408 targets of eight development books / of 30 articles of WikiText-2, seed 0,
  one H200, KL (excess NLL) to nearest, and after 400 steps:
    rtn                1.362 / 1.425    .308 (.160) / .417 (.361)
    block_hadamard      .943 /  .948    .240 (.105) / .314 (.263)
    wush_conditioned    .381 /  .362    .179 (.061) / .229 (.167)
  To Hadamard in as many steps WUSH is ahead by .061 +- .004* / .086 +- .004*, plain rounding behind
  by .069 +- .004* / .103 +- .005*. So the hypothesis holds: it matters, and by far less than before
  (.562, .419). In 1,600 steps under WUSH .149 on the books (frozen.py). A step took .15 to .2 s.
  `learn` itself measured KL on the 64 rows of gutenberg_train.txt that choose the best step
  (results/learned_weights_smollm2_held_out.json; 1,600 steps on 2026-12-01): after 400 steps .292,
  .227, .169, and affine .188 in one run and .189 in another; after 1,600 rtn .225, block_hadamard
  .179. So four times the steps take .048 off Hadamard, less than the .058 by which WUSH is ahead
  with 400. 1,600 steps from the others on these texts, and 6,400, were not run, nor smooth_hadamard
  to its end (.206 after 250 of 400 steps).
"""

import sys
from collections.abc import Iterator

from duquantpp_jax.commands.ablate import AblateOptions, main
from duquantpp_jax.lab import Cell
from experiments.fitted import fits_in

BASELINE = "block_hadamard"
STARTS = ("rtn", BASELINE, "smooth_hadamard", "wush_conditioned", "affine")
STEPS = (400, 1600, 6400)
RULE = "floor"


def CELLS(options: AblateOptions) -> Iterator[Cell]:
    """Each start with weights to nearest, and the fits that --data holds."""
    places = {f"{start}_{steps}": (start, steps) for start in STARTS for steps in STEPS}
    for start in STARTS:
        if start != "affine":
            yield Cell(start, RULE)
    for name, fits in fits_in(options.data, places).items():
        start, steps = places[name]
        yield Cell(f"{start}, {steps} steps", RULE, fits=fits)


def ROWS(cell: Cell) -> str:
    """What is before the weights."""
    return cell.recipe.partition(",")[0]


def COLUMNS(cell: Cell) -> str:
    """Steps that the weights learned for."""
    return cell.recipe.partition(", ")[2] or "to nearest"


if __name__ == "__main__":
    main(sys.modules[__name__])
