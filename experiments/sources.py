"""What is text to learn from worth: books, what the model writes itself, or half of each?

Rows as in frozen.py, W4A4; on books and on articles of an encyclopedia, of neither of which the
model's own text is.
Hypothesis: books are worth most on books, and the model's own text as much on both.
Command: for each name of LEARN and each of SOURCES
    duquantpp learn ... --text TEXTS --rows 19264 --held-out 64 --formats floor \\
      --model smollm2 --out FITS/NAME_SOURCE
  where books are frozen.py's TRAIN, and then
    duquantpp ablate experiments/sources.py --table --model smollm2 --data FITS \\
      --calibration-text gutenberg_calibration.txt --text DEVELOPMENT ARTICLES
  DEVELOPMENT is the first 8 books of gutenberg_valid.txt, ARTICLES the first 30 of
  wikitext2_valid_articles.txt.
"""

import dataclasses
import sys
from collections.abc import Iterator

from duquantpp_jax.checkpoints.fits import ABOUT, read_about
from duquantpp_jax.commands.ablate import AblateOptions, main
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.lab import Cell
from experiments import frozen

BASELINE = "wush"
SOURCES = {"books": "TRAIN", "model": "model", "both": "TRAIN model"}
"""`--text` of `duquantpp learn`."""
ROWS = frozen.ROWS


def CELLS(options: AblateOptions) -> Iterator[Cell]:
    """The baseline, and all that --data holds, under the rule that it was learned for."""
    fits = [] if options.data is None else sorted(options.data.iterdir())
    learned = [
        Cell(path.name, read_about(path)["formats"]["weight"], fits=path)
        for path in fits
        if (path / ABOUT).is_file()
    ]
    for rule in dict.fromkeys(cell.format for cell in learned):
        yield Cell(BASELINE, rule)
    for cell in learned:
        yield cell
        yield dataclasses.replace(cell, rounding="gptq")
        if "weights" not in cell.recipe:
            rows = {"refine": frozen.REFINED, "calibration_tokens": 1984 * TARGETS}
            yield dataclasses.replace(cell, rounding="gptq", **rows)


if __name__ == "__main__":
    main(sys.modules[__name__])
