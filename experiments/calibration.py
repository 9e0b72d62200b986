"""How little calibration is enough, of what text, averaged or pooled?

Hypothesis: smoothing needs the channel maxima, which a few hundred tokens show if position 0 is
  among them; a Gram matrix (WUSH) wants thousands. Text of another domain costs little, since
  outlier channels belong to the model. Averaging over rows, as released, hides what varies.
Method: the first 128 to 130,816 tokens of the calibration text, position 0 included. A fit that
  looks at tokens sees at most 2,048 of them, spread evenly over all; maxima and Gram matrices see
  all. `released, pooled` is the released search on pooled tokens. The baseline is 64 rows, 32,704
  tokens.
Command: duquantpp ablate experiments/calibration.py --table
  or python -m experiments.calibration --table, with --model DIR --text FILE for another model than
  the embedded one, and --calibration-text FILE FILE FILE for several domains: each has its columns.
  Do not evaluate on a text that is also among the domains. The 1,200 stories of tinystories_head
  are mostly shorter than a row, which leaves 70 rows; the embedded rows are 64: more tokens than
  there are is reported as failed.
Cost: 84 cells a domain.
Last result, 2026-11-25, the embedded model on its own text alone (other domains, and gutenberg-27m,
  are not yet run), 65,408 targets, jax 0.12.0.1 on 2 CPU cores
  (results/grid_calibration_testbed.json), KL less that with 32,704 tokens:
    tokens               128                511               2,044             8,176
    smooth_hadamard      +.0118 +- .0022    +.0051 +- .0023   +.0026 +- .0020   -.0004 +- .0019
    greedy               -.0027 +- .0012    +.0004 +- .0012   +.0007 +- .0012   -.0000 +- .0012
    duquantpp            +.0075 +- .0012    +.0019 +- .0012   +.0021 +- .0012   +.0031 +- .0013
    released, averaged   +.0059 +- .0013    -.0022 +- .0013   -.0011 +- .0012   -.0034 +- .0012
    released, pooled     +.0095 +- .0013    +.0014 +- .0013   +.0043 +- .0012   +.0037 +- .0010
    wush                 +.0366 +- .0024    +.0036 +- .0019   +.0049 +- .0021   +.0024 +- .0022
  A row of 511 tokens is within .005 of 64 rows for every method, 16 rows within .004. WUSH wants
  the most, as supposed: with 128 tokens it is behind plain rounding. A surprise: the greedy search
  takes nothing from more tokens, 128 are as good as 32,704. Averaged against pooled tokens: ahead
  by .0036 with 16 rows and behind by .0036 with 64, within what seeds do.
"""

import sys

from duquantpp_jax.ablation import Cell
from duquantpp_jax.ablation.command import main
from duquantpp_jax.evaluation.text import TARGETS
from duquantpp_jax.recipes import FITS
from duquantpp_jax.transforms.basic import FitInTurn, FitSmooth
from duquantpp_jax.transforms.duquant import FitDuquantpp
from experiments.seeding import seeded

_POOLED = FitDuquantpp(
    index="released",
    criterion="range",
    sharing="shared",
    fresh_q=False,
    q_side="right",
    polish=False,
)
_FITS = {
    "smooth_hadamard": FITS["smooth_hadamard"],
    "greedy": FITS["greedy"],
    "duquantpp": FITS["duquantpp"],
    "released, averaged": FITS["duquantpp_released"],
    "released, pooled": FitInTurn((FitSmooth(), _POOLED)),
    "wush": FITS["wush"],
}
TOKENS = (128, *(rows * TARGETS for rows in (1, 4, 16, 64, 256)))

CELLS = [
    cell
    for tokens in TOKENS
    for name, fit in _FITS.items()
    for cell in seeded(Cell(name, "floor", fit=fit, calibration_tokens=tokens))
]
BASELINE = f"{64 * TARGETS:,}"


def ROWS(cell: Cell) -> str:
    """The number of tokens."""
    return f"{cell.calibration_tokens:,}"


def COLUMNS(cell: Cell) -> str:
    """The method, and the text where one is named."""
    text = cell.calibration_text
    return cell.recipe if text is None else f"{cell.recipe}, {text.stem}"


if __name__ == "__main__":
    main(sys.modules[__name__])
