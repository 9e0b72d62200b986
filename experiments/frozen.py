"""What do the learned methods reach on texts on which nothing was chosen?

Rows as in beat_hadamard.py, at most one 32 x 32 matrix per block online, W4A4: **r** a rotation and
scales that fold, **a** any matrix, weights to nearest, **b** those weights rounded by GPTQ, **b'**
the matrices refined for them, **c** weights learned under WUSH.
Hypothesis: their share of WUSH's KL is that of the development text.
Frozen before a final text was read: the commands in LEARN, and what CELLS says. They were chosen on
  the development text (results/smollm2_methods.md).
Command: for each of LEARN and each seed
    duquantpp learn ... --text TRAIN --rows 19264 --held-out 64 --formats floor --seed SEED \\
      --model smollm2 --out FITS/NAME_floor_SEED
  and then
    duquantpp ablate experiments/frozen.py --table --model smollm2 --data FITS \\
      --calibration-text gutenberg_calibration.txt --text DEVELOPMENT BOOKS ARTICLES
  with train.txt, dev.txt, books.txt and articles.txt of docs/protocol.md.
Cost: on two H200s that two or three runs shared, .37 s a step: 5 to 10 minutes to learn a row; some
  30 cells of 5 s for each rule and text; refining six minutes, once for all texts, in float32
  (since then in bfloat16, not timed).
Last result, 2026-11-30 (tables in results/smollm2_methods.md, of results/grid_frozen_*.json; KL on
  BOOKS / ARTICLES, floor): WUSH .367 / .365, r .233 / .265 (three seeds), a .212 / .248, b .238 /
  .278, b' .176 / .235, c .138 / .208 (.151 / .211 at the default rate, the first that was frozen).
  Under rceil: WUSH .350 / .357, r .264 / .285, a .238 / .264, b' .181 / .233, c .147 / .228. On
  books the shares are those of the development text; on articles learning is worth less, for
  weights most. Under even, seed 0: WUSH .319 / .324, r .241 / .262, a .218 / .248, b .235 / .279,
  b' .170 / .222, c .153 / .237, whose held-out KL rose to 3.6 after 200 steps and came back. What
  was frozen took 2,048 rows to refine on; the text has 2,037, so it was made 1,984 before any was
  refined.
"""

import itertools
import sys
from collections.abc import Iterator

from duquantpp_jax.commands.ablate import AblateOptions, main
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.lab import Cell
from experiments.fitted import fits_in
from experiments.seeding import SEEDS, seeded

BASELINE = "wush"
RULES = ("floor", "even", "rceil")
RECIPES = ("rtn", "block_hadamard", "random_hadamard", "smooth_hadamard", "duquantpp", "wush")
LEARN = {
    "smooth_rotation": "--start smooth_hadamard --moves smooth_rotation --steps 800 --rate 6e-3",
    "affine": "--start wush_conditioned --moves affine --steps 1600",
    "weights": "--start wush_conditioned --moves weights --steps 1600 --rate 3e-3",
}
"""Options of `duquantpp learn` for each row."""
REFINED = 400
"""Steps that the affine row is refined for its weights as rounded, on 1,736 of 1,984 rows."""


def CELLS(options: AblateOptions) -> Iterator[Cell]:
    """The recipes, and the learned fits that --data holds, under each rule."""
    for rule, recipe, rounding in itertools.product(RULES, RECIPES, ("rtn", "gptq")):
        yield from seeded(Cell(recipe, rule, rounding=rounding))
    places = {f"{n}_{r}_{seed}": (n, r, seed) for r in RULES for n in LEARN for seed in SEEDS}
    for place, fits in fits_in(options.data, places).items():
        name, rule, seed = places[place]
        for rounding, steps in (("rtn", 0), ("gptq", 0), ("gptq", REFINED)):
            if steps == 0 or name == "affine":
                yield Cell(
                    name,
                    rule,
                    fits=fits,
                    rounding=rounding,
                    refine=steps,
                    seed=seed,
                    calibration_tokens=(1984 if steps else 64) * TARGETS,
                )


def ROWS(cell: Cell) -> str:
    """What is learned, how weights are rounded, and refining."""
    steps = f", refined {cell.refine} steps" if cell.refine else ""
    return cell.recipe + (f", {cell.rounding}" if cell.rounding != "rtn" else "") + steps


if __name__ == "__main__":
    main(sys.modules[__name__])
