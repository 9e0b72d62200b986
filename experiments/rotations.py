"""Does the winner among transforms depend on the scale rule?

Hypothesis: yes. Under power-of-two scales an outlier doubles the step of 31 neighbours, and
  spreading it helps; under a near-continuous scale (log256, fp32) there is less to gain.
Command: python -m experiments.rotations --table [--model DIR --text FILE --calibration-text FILE]
    [--workers N] [--report FILE.html]
  Without --model: the embedded model. Recipes that draw random numbers run with three seeds. Fewer
  of them, or another rounding: duquantpp compare --seeds 3 --recipes .. --rounding gptq.
Cost: see the files' `seconds`; 12 recipes x 6 rules on gutenberg-27m are minutes on one GPU.
Last result, 2026-11-28, all 29 recipes, 65,408 targets, three seeds, gutenberg-27m on H200s and the
  embedded model on two CPU cores (results/rotations.md): yes. learned_affine wins under floor
  (.1039; WUSH .1087, block_hadamard .1191), rceil and fp32, WUSH under even (.0955; learned_affine
  .0974, block_hadamard .1064) and mse; under log256 they are level. Plain rounding, behind nearly
  all under the four MXFP4 rules, is ahead of Hadamard under log256 and fp32: confirmed. What a
  rotation spreads then costs its block nothing, and what it takes away are blocks without outlier.
  On SmolLM2-135M (2026-11-29, 8 development books, H200s, results/grid_rotations_smollm2_*.json;
  floor, even and rceil; without the five recipes of size 128, which does not divide 576): no. WUSH
  is ahead under all three (.390 / .341 / .374), behind it learned_affine (.408 / .389 / .436), then
  smoothed rotations (.48 to .53), then those without smoothing (.85 to 1.12; PCA 1.01 to 1.42).
"""

import sys

from duquantpp_jax.commands.ablate import main
from duquantpp_jax.lab import Cell
from duquantpp_jax.recipes import FITS
from experiments.seeding import seeded

RULES = ("floor", "even", "rceil", "mse", "log256", "fp32")
BASELINE = "block_hadamard"

CELLS = [cell for name in FITS for rule in RULES for cell in seeded(Cell(name, rule))]

if __name__ == "__main__":
    main(sys.modules[__name__])
