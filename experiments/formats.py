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
Last result: not yet run.
"""

import sys

from duquantpp_jax.ablation import Cell
from duquantpp_jax.ablation.command import main
from duquantpp_jax.core import Format, ScaleRule
from duquantpp_jax.formats import E2M3, E3M2, E4M3, E5M2, MX, MXFP4, NVFP4
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
