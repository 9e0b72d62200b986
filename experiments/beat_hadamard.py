"""How far can one 32 x 32 matrix per block go beyond Hadamard?

Three rows, never mixed; at most one 32 x 32 per block online, E8M0 scales, W4A4:
  a  the transform alone; weights are its move of the float ones, rounded to nearest
  b  and weights rounded by calibration without gradient
  c  anything learned offline: transform, weights, clips, scale offsets
Hypothesis: learned through the whole model, the transform takes a quarter off Hadamard's KL;
  once weights are learned it matters little.
Command: duquantpp ablate experiments/beat_hadamard.py --table [--model DIR --text FILE
    --calibration-text FILE] [--data FITS]
  FITS holds a directory for each learned row and rule that is there, affine_floor say, of
    duquantpp learn --start wush --moves affine --steps 800 --formats floor --out FITS/affine_floor
  likewise smooth_rotation_RULE (--start smooth_hadamard --moves smooth_rotation --steps 800 --rate
  6e-3), affine_blocks_RULE (--through block), weights_RULE (--start block_hadamard --moves
  weights --steps 1600) and both_RULE (--moves affine weights --steps 1500), with --model DIR --text
  FILE --rows N. Statistics for rounding come from 64 calibration rows, of refined cells from all
  that they learn from: 2,048 rows, or those of the embedded model.
Cost: 14 cells, 28 more with all learned fits under both rules; refining 800 steps on one H100 for
  gutenberg-27m is about 60 ms a step, a minute or two to compile.
Last result, 2026-11-25 and 2026-11-28, with a bench of its own that also learned from 19,000 rows
  of other books and from what other rows had learned, gutenberg-27m, 261,632 targets, jax 0.11.2 on
  two H100s that 3 to 6 runs shared (a of 2,400 steps and Hadamard refined: two H200s, 2 runs each;
  results/beat_hadamard_gutenberg27m_512rows.json; table in results/gutenberg27m.md). Learned on
  21,197 rows (2,197 of the calibration text, 19,000 of books that the model was trained on). KL,
  floor / even, means of three seeds; the difference is to the best method known before, run again
  here with one seed; in brackets that method, and Hadamard with the same treatment (of which row b
  was measured on a CPU):
    a  affine from WUSH, 800 steps   .0884 / .0847    -.0014 +- .0006 / -.0049 +- .0006
       (affine, 400 steps: .0898 / .0896; Hadamard: .1178 / .1066)
       2,400 steps, two seeds        .0850 / .0826    -.0059 +- .0007 / -.0078 +- .0006
       (to the known method on the same card, .0909 / .0903)
    b  that of 800, then GPTQ with   .0855 / .0796    -.0024 +- .0006 / -.0052 +- .0006
       descent (affine of 400 steps with GPTQ: .0879 / .0847; Hadamard: .0927 / .0865)
       then 800 steps of the         .0739 / .0698    -.0140 +- .0010 / -.0149 +- .0010
       transform for the rounded weights, which are held (one seed / two)
       Hadamard with descent,        .0766 / .0734    -.0113 +- .002 / -.0113 +- .002 (two
       refined likewise              differences and their intervals added, by way of Hadamard with
       descent, to which it is -.0162 +- .0010 / -.0134 +- .0010)
    c  Hadamard, weights learned,    .0682 / .0664    -.0055 +- .0005 / -.0038 +- .0005
       1,600 steps (WUSH with weights learned, 400 steps: .0737 / .0702)
  Hadamard wins row c: 800 steps of row a and then 800 of transform and weights give .0699 / .0672,
  +.0017 +- .0004 / +.0008 +- .0005 to as many steps of the weights alone. So once weights are
  learned the transform is worth less than the steps that it costs. The surprise is what it does for
  weights that are rounded already: held as they are, with only the matrix of 32 x 32 before each
  block of inputs moving, KL falls by 12 to 17 %, and row b is nearly as good as row c without a
  weight having learned. Such a transform is no inverse of what moved the weights: it makes good
  what rounding them has done, and a Hadamard matrix that is refined so stops being one. The affine
  start is still worth .003 to .004. Of each row's gain over RTN Hadamard, relative
  to it, 72 / 77 % (2,400 steps), 69 / 73 % (refined; from Hadamard 71 / 79 %) and 75 / 73 % is left
  on WikiText-2.
  Embedded model, one seed, on Gutenberg (results/beat_hadamard_testbed.json): a .1354 / .1325
  (Hadamard .1903 / .2037), b refined .1077 / .1019 (Hadamard with GPTQ and descent .1531 / .1487).
  On its own text, with no more than its 58 rows to learn from
  (results/beat_hadamard_testbed_58rows.json): a .1423 / .1386 (.1867 / .2024), b refined .1248 /
  .1187 (descent .1510 / .1407, refined .1317 / .1251), c .1280 / .1207 for Hadamard, whose weights
  learn these rows by heart (.119 on them and .129 on rows held out after 100 steps, the best; .049
  and .143 after 1,600), .1236 / .1169 for the affine one and, best, .1204 / .1125 for 400 steps
  from WUSH. With so little text the transform does matter.
  SmolLM2-135M (results/smollm2_methods.md): the transform takes 40 % off WUSH's KL, a rotation and
  scales that fold nearly as much, GPTQ afterwards does harm, weights learned under WUSH take 55 %.
Search: one seed, floor, 65,408 targets, KL and (that on WikiText-2, where RTN Hadamard has .2031);
  RTN Hadamard is .1191 here, Hadamard with GPTQ .0974.
  a  affine from WUSH, 400 steps on calibration text          .0920  (.1760)
     the same, 1,500 steps, 22,000 rows more                  .0872  (.1705)
     and gradients through the block's amax                   .0870  (.1671)
     once more, 19,000 rows                                   .0864  (.1631)
     and 30 % of the tokens of every second row replaced      .0889  (.1630)
     block by block, 1,500 steps each, calibration text alone .0881  (.1605)
     1,600 steps, 512 rows, two seeds, floor and even         .0863, .0835
     800 steps on 51,736 rows of text, not 21,197: the same, .0886 and .0845 (512 rows, three seeds)
     learned on rounded activations alone                     .0994  (.1797)
  b  Hadamard, GPTQ and four passes of descent                .0937
     Hadamard, asymmetric regression and GPTQ                 .0924
     learned on rounded activations alone, then GPTQ          .0872
     800 steps of it: GPTQ .0895, with descent                .0875
     affine of row a (1,500 steps), GPTQ with descent         .0841  (.1660)
     of 800 steps                                             .0863  (.1672)
     that, 256 rows for the Hessian, not 64                   .0853  (.1642)
     that, refined after rounding: 400 steps at 1e-3          .0815  (.1676)
     800 steps at 1e-3                                        .0779  (.1628)
     400 steps at 3e-4                                        .0762  (.1539)
     rounded and refined once more, 400 steps at 1e-3         .0820  (.1636)
     refined after rounding to nearest, 400 steps at 1e-3     .0855  (.1735)
     Hadamard with descent, refined, 400 steps at 1e-3: what
       was Hadamard is not any more                           .0806  (.1614)
     affine of row a, asymmetric regression and descent: worse than nearest, .0919 on 512 rows,
       where Hadamard gains by it
  c  Hadamard fixed, weights learned at 1e-4, 1,500 steps     .0684  (.1339)
     800 steps at 1e-4                                        .0721  (.1442)
     at 2e-4                                                  .0737  (.1496)
     at 4e-4                                                  .0818  (.1672)
     at 2e-4, gradients through the block's amax              .0727  (.1496)
     at 2e-4, clips learned as well                           .0748  (.1497)
     at 2e-4, 30 % of the tokens of every second row replaced .0742  (.1495)
     affine of row a, fixed, weights at 2e-4                  .0720  (.1541)
     affine of row a, moving at 1e-4 while weights learn      .0713  (.1431)
     learned on rounded activations alone, fixed              .0713  (.1458)
     affine from WUSH at 1e-3 while weights learn, which are
       held where they are rounded ("moved"), 1,500 steps     .0734
     and scale offsets learned at 1e-2                        .0751
     on 51,736 rows, 800 steps: Hadamard fixed                .0725  (.1429)
       weights at 5e-5                                        .0738  (.1471)
       and the transform refined after, 400 steps at 3e-4     .0718  (.1419)
       affine from Hadamard at 3e-4, weights held where they
       are rounded, gradients through amax                    .0718  (.1387)
     Hadamard, block by block, 800 steps each, 512 rows       .0756  (.1610)
  Block by block keeps 97 % of the gain of as many steps end to end in row a (95 % of the best), and
  85 % of that of twice the steps in row c, from a tenth of the text. Why moving the transform hurts
  the weights: by its rate. At 1e-3 it does (.0734, where the weights alone reach .0684 in as many
  steps), also where the weights are held in the moved space, so it is not only that they are
  rounded anew; at 1e-4 it does not (.0713, fixed .0720), nor at 3e-4 in the moved space (.0718,
  fixed .0725), which is the cure: move the inputs alone, and no more than three times as fast as
  the weights. That weights cannot follow activations that move faster than they fits all of these.
"""

import sys
from collections.abc import Iterator

from duquantpp_jax.commands.ablate import AblateOptions, main
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.lab import Cell
from experiments.fitted import fits_in
from experiments.seeding import seeded

RULES = ("floor", "even")
BASELINE = "block_hadamard"
STEPS = 800
"""Of refining."""
REFINE_ROWS = {False: 64, True: 2048}
"""Rows that refined cells are calibrated on and learn from, without --model and with it."""
ROUNDINGS = (("rtn", 0), ("gptq", 0), ("descent", 0), ("asymmetric_descent", 0), ("descent", STEPS))
LEARNED = {
    "affine": (*ROUNDINGS[:3], ("asymmetric_descent", 0), ("descent", STEPS)),
    "smooth_rotation": ROUNDINGS[:3],
    "affine_blocks": (("rtn", 0),),
    "weights": ROUNDINGS[:2],
    "both": (("rtn", 0),),
}
"""Of each learned row, how its weights are rounded and for how many steps it is refined."""


def CELLS(options: AblateOptions) -> Iterator[Cell]:
    """Hadamard, and the learned fits that --data holds."""
    there = fits_in(options.data, (f"{name}_{rule}" for rule in RULES for name in LEARNED))
    for rule in RULES:
        for name, ways in {BASELINE: ROUNDINGS, **LEARNED}.items():
            fits = there.get(f"{name}_{rule}")
            if name in LEARNED and fits is None:
                continue
            for rounding, steps in ways:
                rows = REFINE_ROWS[options.model is not None] if steps else 64
                cell = Cell(name, rule, fits=fits, rounding=rounding, refine=steps,
                            calibration_tokens=rows * TARGETS)  # fmt: skip
                yield from seeded(cell)


def ROWS(cell: Cell) -> str:
    """What is learned, how weights are rounded, and refining."""
    steps = f", refined {cell.refine} steps" if cell.refine else ""
    return cell.recipe + (f", {cell.rounding}" if cell.rounding != "rtn" else "") + steps


if __name__ == "__main__":
    main(sys.modules[__name__])
