"""The attempts of beat_hadamard.py: what each method is, by the row that its name begins with."""

import dataclasses
from typing import Literal

from duquantpp_jax.learning.moves import Moves
from duquantpp_jax.transforms.learned import Affine

STILL = Moves(None)


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A method of one row.

    Attributes:
      start: What the transform starts as: that of a recipe, or what another attempt learned.
      steps: Of learning; with none the start is taken as it is.
      moves: What learns.
      rounding: Of the weights in the end.
      refine: Steps of the transform after that, the rounded weights held.
      by_blocks: Learn a decoder block after the other, each on what the quantized ones before it
        give, and not through the whole model. Hidden states of all rows are kept: do without
        --train-text.
      rates: Peak learning rates of the transform, of the weights, and of clips and scale offsets;
        warmed up over a twentieth of the steps, then down a cosine to zero.
    """

    start: str
    steps: int = 0
    moves: Moves = STILL
    rounding: Literal["rtn", "gptq", "descent", "asymmetric", "asymmetric_descent"] = "rtn"
    rates: tuple[float, float, float] = (1e-3, 1e-4, 1e-2)
    refine: int = 0
    by_blocks: bool = False


_AFFINE = Moves(Affine())
AFFINE_AMAX = Moves(Affine(), through_amax=True)
_INPUT_ONLY = Moves(Affine(), round_weights=False)
_SLOW = (3e-4, 1e-4, 1e-2)
_WEIGHTS = Moves(None, "given")
_BOTH = Moves(Affine(), "given")

ATTEMPTS: dict[str, Attempt] = {
    "a_hadamard": Attempt("block_hadamard"),
    "a_affine_400": Attempt("wush", 400, _AFFINE),
    "a_affine": Attempt("wush", 1500, _AFFINE),
    "a_affine_amax": Attempt("wush", 800, AFFINE_AMAX),
    "a_affine_long": Attempt("wush", 2400, AFFINE_AMAX),
    "a_affine_blocks": Attempt("wush", 1500, _AFFINE, by_blocks=True),
    "a_input": Attempt("wush", 1500, _INPUT_ONLY),
    "b_hadamard_gptq": Attempt("block_hadamard", rounding="gptq"),
    "b_hadamard_descent": Attempt("block_hadamard", rounding="descent"),
    "b_hadamard_asymmetric": Attempt("block_hadamard", rounding="asymmetric_descent"),
    "b_affine_400_gptq": Attempt("a_affine_400", rounding="gptq"),
    "b_input_gptq": Attempt("a_input", rounding="gptq"),
    "b_affine_asymmetric": Attempt("a_affine_amax", rounding="asymmetric_descent"),
    "b_affine_descent": Attempt("a_affine_amax", rounding="descent"),
    "b_affine_refined": Attempt("a_affine_amax", rounding="descent", refine=800, rates=_SLOW),
    "b_hadamard_refined": Attempt("block_hadamard", rounding="descent", refine=800, rates=_SLOW),
    "c_hadamard": Attempt("block_hadamard", 1600, _WEIGHTS),
    "c_hadamard_blocks": Attempt("block_hadamard", 800, _WEIGHTS, by_blocks=True),
    "c_wush_400": Attempt("wush", 400, _WEIGHTS),
    "c_wush": Attempt("wush", 1600, _WEIGHTS),
    "c_input": Attempt("a_input", 800, _WEIGHTS),
    "c_affine_fixed": Attempt("a_affine_amax", 800, _WEIGHTS),
    "c_affine_slow": Attempt("a_affine_amax", 800, _BOTH, rates=(1e-4, 1e-4, 1e-2)),
    "c_affine_given": Attempt("wush", 1500, _BOTH),
    "c_affine_moved": Attempt("wush", 1500, Moves(Affine(), "moved")),
}
