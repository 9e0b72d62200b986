"""What does it cost to round weights under one scale rule and activations under another?

Hypothesis: little. Weights are stored as codes and scales, so a runtime's rule reaches activations
  alone; the rules of the sides do not look at one another.
Method: every pair of five rules, weights rounded to nearest and by GPTQ, after two transforms that
  do not look at the format. The baseline is floor weights with floor activations.
Command: duquantpp ablate experiments/served.py --table
  or python -m experiments.served --table, with --model DIR --text FILE --calibration-text FILE for
  another model than the embedded one.
Cost: 100 cells.
Last result, 2026-11-29, SmolLM2-135M, 65,408 targets of 8 development books, H200s
  (results/grid_served_smollm2_128rows.json), KL; rows are the rule of weights, columns that of
  activations:
               block_hadamard, to nearest       wush, GPTQ
               floor  even   rceil  mse         floor  even   rceil  mse
    floor      .943   .937   .951   .941        .322   .309   .333   .313
    even       .910   .936   .957   .937        .293   .282   .290   .279
    rceil      .997   1.025  1.031  1.006       .300   .294   .311   .292
    mse        .895   .913   .918   .902        .292   .278   .292   .274
    ceil       1.351  1.391  1.447  1.403       .364   .351   .370   .354
  with intervals of +- .009 to .033 and +- .003 to .012 on differences. The hypothesis is half
  right: mixing costs nothing, but the sides are far from equal. The rule of weights is worth more,
  and costs nothing to serve, for weights are stored with their scales: a runtime that has rceil
  should get weights by mse (.918, not 1.031; .292, not .311). Activations want even or mse (with
  Hadamard and weights to nearest floor is as good or better). With Hadamard and GPTQ KL and NLL
  disagree: weights under even and activations under rceil have a KL .003 lower than floor has on
  both and an NLL .020 +- .008 higher.
"""

import sys

from duquantpp_jax.commands.ablate import main
from duquantpp_jax.lab import Cell

RULES = ("floor", "ceil", "even", "rceil", "mse")
RECIPES = ("block_hadamard", "wush")
CELLS = [
    Cell(recipe, weight_format=weight, activation_format=activation, rounding=rounding)
    for recipe in RECIPES
    for rounding in ("rtn", "gptq")
    for weight in RULES
    for activation in RULES
]
BASELINE = "floor, floor"


def ROWS(cell: Cell) -> str:
    """The rule of weights and that of activations."""
    return f"{cell.weight_format}, {cell.activation_format}"


def COLUMNS(cell: Cell) -> str:
    """The recipe and how weights are rounded."""
    return f"{cell.recipe}, {cell.rounding}"


if __name__ == "__main__":
    main(sys.modules[__name__])
