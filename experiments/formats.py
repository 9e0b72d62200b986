"""In which formats does rotation help, and where does it stop?

Hypothesis: it helps where a block is large and its elements are few: the more bits an element has,
  the less its block's outlier costs the others. With blocks of 16, with NVFP4's finer scales and
  with 8 bits, plain rounding should be as good.
Method: both sides in one format, transforms of side 32 whatever the block. Scale rules: floor and
  even for E2M1; even for MXFP6; rceil for MXFP8, where floor saturates. The baseline of a column is
  plain rounding in its format.
Command: duquantpp ablate experiments/formats.py --table
  or python -m experiments.formats --table, with --model DIR --text FILE --calibration-text FILE for
  another model than the embedded one.
Cost: 120 cells, and a compilation for each format.
Last result, 2026-11-25 (commit 94b2184), gutenberg-27m on Gutenberg, 65,408 targets, H100
  (results/grid_formats_*.json), KL of plain rounding, and what block_hadamard and duquantpp add:
    mxfp4 floor, blocks of 16    .1370    -.0074 +- .0012    -.0160 +- .0017
    mxfp4 floor, 32              .1390    -.0199 +- .0013    -.0241 +- .0013
    mxfp4 floor, 64              .1490    -.0328 +- .0017    -.0329 +- .0015
    mxfp4 even, 16               .1073    -.0023 +- .0020    -.0087 +- .0015
    mxfp4 even, 32               .1231    -.0166 +- .0017    -.0207 +- .0015
    mxfp4 even, 64               .1480    -.0336 +- .0024    -.0372 +- .0027
    nvfp4                        .0671    +.0107 +- .0013    +.0057 +- .0006
    nvfp4 4/6                    .0590    +.0040 +- .0007    +.0008 +- .0007
    mxfp6 e2m3                   .0076    -.0013 +- .0001    -.0015 +- .0001
    mxfp6 e3m2                   .0209    +.0026 +- .0003    +.0010 +- .0002
    mxfp8 e4m3                   .0053    +.0005 +- .0001    +.0002 +- .0001
    mxfp8 e5m2                   .0210    +.0026 +- .0004    +.0008 +- .0003
  The hypothesis holds, and more: where rotation stops helping it does harm. In NVFP4 it adds 16 %
  to the KL. What decides is not the number of bits but the share of them that are exponents: e2m3
  gains (17 %), e3m2, e4m3 and e5m2 lose; an element with a wide range holds a block's outlier and
  its small values by itself, and a rotation takes the small values away. With power-of-two scales a
  block of 64 after a rotation is as good as one of 16 without (.1162 and .1370 under floor).
  WikiText-2 says the same: in NVFP4 +.0188 +- .0016 and +.0124 +- .0013 of .1236, in MXFP4 of 64
  under floor -.0483 and -.0404 of .2484, in e2m3 -.0031 and -.0037 of .0154; only in e4m3 is
  duquantpp level (+.0001 +- .0001). So does the embedded model (2 CPU cores): in NVFP4 +.0196 and
  +.0060 of .1077, in e3m2, e4m3 and e5m2 +20 to +22 % and +8 to +9 %, in MXFP4 of 64 -.0305 and
  -.0381, in e2m3 -.0004 and -.0015. Only its block_hadamard in MXFP4 of 16 and 32 under even does
  harm (+.012, +.014), which is one token's doing (position_zero.py): random signs do not at 32
  (-.0050).
  On SmolLM2-135M (2026-11-29, 8 development books, H200s, seed 0), KL of plain rounding, and what
  block_hadamard, smooth and smooth_hadamard add: mxfp4 even in blocks of 32 1.094, -.158 -.275
  -.610; nvfp4 .442, +.238 -.151 -.100; nvfp4 4/6 .421, +.119 -.165 -.152; mxfp6 e2m3 .059, -.012
  -.015 -.033; mxfp6 e3m2 .153, +.016 -.005 -.056; mxfp8 e4m3 .034, +.008 -.000 -.010. With
  smoothing before it a rotation helps in wide elements too; in nvfp4 it does not.
"""

import sys

from duquantpp_jax.commands.ablate import main
from duquantpp_jax.core import Format, ScaleRule
from duquantpp_jax.formats import E2M3, E3M2, E4M3, E5M2, MX, MXFP4, NVFP4
from duquantpp_jax.lab import Cell
from experiments.seeding import seeded

FORMATS: dict[str, Format] = {
    **{
        f"mxfp4 {rule.value}, {size}": MXFP4(block_size=size, scale_rule=rule)
        for rule in (ScaleRule.FLOOR, ScaleRule.EVEN)
        for size in (16, 32, 64)
    },
    "nvfp4": NVFP4(),
    "nvfp4 4/6": NVFP4(four_over_six=True),
    "mxfp6 e2m3": MX(E2M3, scale_rule=ScaleRule.EVEN),
    "mxfp6 e3m2": MX(E3M2, scale_rule=ScaleRule.EVEN),
    "mxfp8 e4m3": MX(E4M3, scale_rule=ScaleRule.RCEIL),
    "mxfp8 e5m2": MX(E5M2, scale_rule=ScaleRule.RCEIL),
}
RECIPES = ("rtn", "smooth", "block_hadamard", "random_hadamard", "smooth_hadamard", "duquantpp")

CELLS = [
    cell
    for recipe in RECIPES
    for name, format in FORMATS.items()
    for cell in seeded(Cell(recipe, name, weight_format=format, activation_format=format))
]
BASELINE = "rtn"

if __name__ == "__main__":
    main(sys.modules[__name__])
