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
Last result, 2026-11-25 (commit d3e1111), gutenberg-27m on Gutenberg, 65,408 targets, H100,
  calibrated on TinyStories 2 CPU cores (results/grid_calibration_*.json), KL less that with 32,704
  tokens of the same text, calibrated on books | WikiText-2 | TinyStories, with intervals of +-
  .001 to .003:
    tokens              128                     511                     2,044
    smooth_hadamard     +.0125 +.0168 +.0188    +.0047 +.0052 +.0119    -.0006 +.0033 +.0042
    greedy              +.0014 +.0012 +.0005    -.0014 +.0007 -.0006    -.0019 +.0004 +.0006
    duquantpp           +.0129 +.0183 +.0211    +.0071 +.0066 +.0137    +.0021 +.0028 +.0035
    released, averaged  +.0122 +.0199 +.0203    +.0042 +.0074 +.0121    +.0014 +.0028 +.0032
    released, pooled    +.0136 +.0197 +.0213    +.0056 +.0071 +.0131    +.0019 +.0037 +.0042
    wush                +.0283 +.0330 +.0344    +.0084 +.0126 +.0184    +.0028 +.0028 +.0042
  16 rows, 8,176 tokens, are as good as 64 for every method (within .0025, most within .001), and
  256 are no better; 4 rows are within .0042. With 32,704 tokens WikiText-2 and TinyStories cost
  against books: smooth_hadamard .0009 and .0004, greedy -.0007 and -.0015, duquantpp .0022 and
  .0028, wush .0062 and .0063 (.1089 becomes .115, still ahead of Hadamard's .1191): what is fitted
  to second moments is fitted to the text as well. Averaged or pooled, as released or not: .0014 at
  most from 4 rows on, within what seeds do. A surprise: the greedy search takes nothing from
  tokens, 128 are nearly as good as 130,816.
  On the embedded model, on its own text (2 CPU cores): the same, but for one row, which is within
  .005 of 64 for every method there, WUSH's included.
  On SmolLM2-135M (2026-11-29, 8 development books, H200s, 8,000 characters of each calibration
  book, so without the 130,816 tokens): of 128, 511, 2,044 and 8,176 tokens WUSH has +.080*, +.018,
  -.008, +.016*, duquantpp -.025, -.033, -.017, -.031*, smooth_hadamard -.020, -.018, -.015, -.006.
  From where (2026-11-30, the same model and text, 32,704 tokens): of other books (train.txt of
  docs/protocol.md) in place of gutenberg_calibration WUSH has .389 and .392 (-.004 +- .006),
  duquantpp less .002, .022 and .003 by seed, smooth_hadamard .525 and .502 (+.023 +- .008; one
  H200, results/grid_calibration_sources_smollm2_128rows.json): which books matters as much as how
  many. Of what the model itself writes (16,352 targets, two CPU cores, results/
  grid_calibration_own_text_smollm2_32rows.json) WUSH has .377, of gutenberg_calibration .388 (-.011
  +- .009; NLL -.009 +- .023): as good, and needs no text.
"""

import sys

from duquantpp_jax.commands.ablate import main
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.lab import Cell
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
