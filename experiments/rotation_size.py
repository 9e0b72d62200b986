"""Is a rotation as large as the block of the format, 32, the best one?

Hypothesis: DuQuant++ says so: a larger rotation spreads an outlier over blocks that had none, a
  smaller one leaves it to fewer channels. For a rotation that does not look at the data, larger
  ones make all blocks more alike, which helps if the mean block is what matters.
Method: sizes 8 to 512 and the full width of every site, blocks of 32. `duquantpp` draws one Q a
  search at every size, since 128 of them at full width would be most of the cost.
Command: duquantpp ablate experiments/rotation_size.py --table
  or python -m experiments.rotation_size --table, with --model DIR --text FILE
  --calibration-text FILE for another model than the embedded one.
Cost: 160 cells; a size that does not divide a width is reported as failed (512 on the embedded
  model). Online, size r costs r multiply-adds a value unless it is a fast Hadamard transform.
Last result, 2026-11-25 and (WikiText-2) 2026-11-28 (commit aee37a8), gutenberg-27m, 65,408 targets
  of each text, H100 and H200 (results/grid_rotation_size_*.json), KL less that at 32, on Gutenberg:
    size                    8        16       64       128      256      full
    hadamard, floor         +.0035   -.0021   -.0002   +.0016   +.0050   +.0025
    hadamard, even          +.0035   +.0001   +.0044   +.0042   +.0044   +.0053
    random signs, floor     +.0039   +.0003   +.0007   +.0016   +.0025   +.0043
    random signs, even      +.0021   +.0003   +.0005   +.0007   +.0018   +.0042
    haar, floor             +.0039   +.0018   -.0023   -.0013   +.0002   -.0007
    haar, even              +.0046   -.0014   -.0029   -.0001   -.0005   -.0003
    duquantpp, floor        +.0066   +.0023   +.0011   +.0005   -.0013   +.0001
    duquantpp, even         +.0049   +.0024   +.0007   +.0003   +.0000   -.0012
  and calibrated on Gutenberg as before, on WikiText-2:
    hadamard, floor         +.0175   -.0034   +.0007   +.0097   +.0155   +.0061
    hadamard, even          +.0120   -.0065   +.0065   +.0162   +.0091   +.0114
    random signs, floor     +.0139   -.0020   -.0007   +.0045   +.0074   +.0130
    random signs, even      -.0004   +.0023   -.0009   +.0032   +.0131   +.0111
    haar, floor             +.0093   -.0006   -.0035   -.0047   -.0031   +.0001
    haar, even              +.0130   -.0051   -.0056   -.0003   -.0048   -.0006
    duquantpp, floor        +.0213   +.0131   +.0129   +.0056   +.0048   +.0061
    duquantpp, even         +.0130   +.0091   +.0064   +.0025   +.0070   +.0034
  with 95 % intervals of +- .001 to .0025 over text. They say nothing of seeds: the three of a mean
  lie up to .006 apart at home, up to .023 on WikiText-2, where differences below .01 are therefore
  a hint and no more. For Hadamard matrices as large as the block is right, but not sharply: 16 is
  as good, and half the cost online, 64 mostly is, and the full width costs .0025 to .0053 at home
  and .006 to .013 away. Haar rotations, behind Hadamard at every size, do not mind. Of DuQuant++'s
  own claim one half holds at home: smaller than the block is worse, but larger is level, and at
  256 under floor and 512 under even a little better (-.0013 +- .0009, -.0012 +- .0009). On
  WikiText-2, to our surprise, the means have 32 ahead of every other size under both rules; of 8,
  16 and 64 by more than seeds do, under floor.
  On the embedded model random signs are level up to 64 and lose .006 to .008 from 128 on (floor);
  DuQuant++ loses .005 at 8, is within .002 of 32 from 64 on under floor and gains .003 at 256 and
  full under even. Its columns of plain Hadamard under even mean little: see position_zero.py.
SmolLM2-135M, 2026-11-30 (results/grid_rotation_size_smollm2_128rows.json), 65,408 targets of the
  development books, one H200; 128 to 512 do not divide its 576 channels. KL at 32, and less it:
    size                    32       8        16       64       full
    hadamard, floor         .945     +.170    -.077    -.003    -.003
    hadamard, even          .936     +.096    -.137    -.021    -.020
    random signs, floor     .984     +.074    -.028    -.019    +.070
    random signs, even      .905     +.079    +.008    +.028    +.086
    haar, floor            1.026     +.136    +.244    +.050    +.049
    haar, even             1.022     +.086    +.077    -.012    +.037
    duquantpp, floor        .518     +.079    +.021    -.006    -.001
    duquantpp, even         .482     +.046    +.020    -.013    +.001
  Significant, after Holm's correction over the table, is only what plain Hadamard gains at 16 (+-
  .010 and .019) and loses at 8 (+- .026 and .031): of what draws numbers, three seeds leave +- .02
  to .29. So here, too, nothing speaks for 32 in particular.
"""

import sys

from duquantpp_jax.commands.ablate import main
from duquantpp_jax.lab import Cell
from duquantpp_jax.transforms.basic import FitInTurn, FitSmooth
from duquantpp_jax.transforms.duquant import FitDuquantpp
from duquantpp_jax.transforms.haar import FitHaar
from duquantpp_jax.transforms.hadamard import FitHadamard
from experiments.seeding import seeded

SIZES = (8, 16, 32, 64, 128, 256, 512, None)
RULES = ("floor", "even")


def _name(size: int | None) -> str:
    return "full" if size is None else str(size)


def _fits(size: int | None):
    return {
        "hadamard": FitHadamard(size=size),
        "random hadamard": FitHadamard(size=size, random_signs=True),
        "haar": FitHaar(size=size),
        "duquantpp": FitInTurn((FitSmooth(), FitDuquantpp(size=size, fresh_q=False))),
    }


CELLS = [
    cell
    for size in SIZES
    for name, fit in _fits(size).items()
    for rule in RULES
    for cell in seeded(Cell(f"{name} {_name(size)}", rule, fit=fit))
]
BASELINE = "32"


def ROWS(cell: Cell) -> str:
    """The rotation size."""
    return cell.recipe.rpartition(" ")[2]


def COLUMNS(cell: Cell) -> str:
    """The method and the scale rule."""
    return f"{cell.recipe.rpartition(' ')[0]}, {cell.format}"


if __name__ == "__main__":
    main(sys.modules[__name__])
