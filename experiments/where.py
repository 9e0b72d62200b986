"""Where does the KL of MXFP4 come from: weights or activations, which site, which layers?

Hypothesis: activations more than weights, and most of all the inputs of down_proj, which hold the
  massive activations; a transform takes from the activations' part alone.
Method: one side alone in MXFP4 (the other in bf16, or for weights, which no 16-bit format stores,
  in MXFP8 e4m3 under the same rule), the linears of one site alone, all but those, and one quarter
  of the layers alone. The baseline is the same recipe on all linears.
Command: duquantpp ablate experiments/where.py --table
  or python -m experiments.where --table, with --model DIR --text FILE --calibration-text FILE for
  another model than the embedded one.
Cost: 120 cells.
Last result, 2026-11-29, SmolLM2-135M, 65,408 targets of 8 development books, H200s
  (results/grid_where_smollm2_128rows.json), KL, floor / even:
                        rtn              block_hadamard   smooth_hadamard  wush
    all                 1.362 / 1.094    .943 / .936      .502 / .484      .390 / .341
    activations alone   .762 / .596      .333 / .304      .224 / .212      .188 / .173
    weights alone       .514 / .436      .585 / .571      .262 / .245      .200 / .170
    q, k, v alone       .364 / .309      .299 / .276      .104 / .082      .079 / .060
    o alone             .115 / .059      .047 / .040      .051 / .045      .034 / .029
    gate, up alone      .443 / .356      .279 / .250      .206 / .177      .178 / .150
    down alone          .296 / .262      .262 / .241      .152 / .140      .119 / .095
  Half of the hypothesis holds: activations cost more than weights, but after a Hadamard matrix
  less, since it adds to the part of the weights; smoothing and WUSH take from both. down_proj,
  before which the massive activations are, is not the worst site: gate and up are, and q, k, v
  without smoothing. The sites add up to the whole within 14 %. By quarters of the layers the first
  and the last cost 1.7 to 3 times the third.
"""

import sys
from collections.abc import Iterator

from duquantpp_jax.checkpoints import load_config, testbed
from duquantpp_jax.commands.ablate import AblateOptions, main
from duquantpp_jax.lab import Cell

BASELINE = "all"
SITES = {
    "q, k, v": ("*.q_proj", "*.k_proj", "*.v_proj"),
    "o": ("*.o_proj",),
    "gate, up": ("*.gate_proj", "*.up_proj"),
    "down": ("*.down_proj",),
}
"""Which linears share an input, by their names."""
RECIPES = ("rtn", "block_hadamard", "smooth_hadamard", "wush")
QUARTERS = 4


def CELLS(options: AblateOptions) -> Iterator[Cell]:
    """Every part of the model that `options` name, by every recipe."""
    layers = load_config(options.model or testbed.directory()).num_hidden_layers
    for recipe in RECIPES:
        for rule in ("floor", "even"):
            sides = {"weight_format": f"mxfp8:{rule}", "activation_format": "bf16"}
            yield Cell(recipe, rule)
            for side, format in sides.items():
                yield Cell(recipe, rule, **{side: format})
            for patterns in SITES.values():
                yield Cell(recipe, rule, include=patterns)
                yield Cell(recipe, rule, exclude=patterns)
            for quarter in range(QUARTERS):
                numbers = range(quarter * layers // QUARTERS, (quarter + 1) * layers // QUARTERS)
                yield Cell(recipe, rule, include=tuple(f"model.layers.{n}.*" for n in numbers))


def ROWS(cell: Cell) -> str:
    """Which part is quantized."""
    sides = {"bf16": "weights alone", None: "activations alone"}
    if cell.weight_format or cell.activation_format:
        return sides[cell.activation_format]
    for site, patterns in SITES.items():
        if cell.include == patterns:
            return f"{site} alone"
        if cell.exclude == patterns:
            return f"all but {site}"
    if cell.include == ("*",):
        return BASELINE
    first, last = (pattern.split(".")[2] for pattern in (cell.include[0], cell.include[-1]))
    return f"layers {first} to {last}"


def COLUMNS(cell: Cell) -> str:
    """The recipe and the scale rule."""
    return f"{cell.recipe}, {cell.format}"


if __name__ == "__main__":
    main(sys.modules[__name__])
