"""Why is block Hadamard worse under `even` than under `floor` on the embedded model?

Hypothesis: token 0 at position 0 carries a massive activation (30 times the median channel before
  the first down_proj), the same in every row. A Hadamard matrix makes 32 equal magnitudes of it,
  so that one rounding decides for all of them, and for every row: luck, not a property of the rule.
Method: KL as in `duquantpp compare`, and once more with position 0 of every site left in float.
Command: python -m experiments.position_zero [--tokens N]
Cost: 2 minutes on 2 CPU cores.
Last result (2026-11-25, jax 0.12.0.1, CPU, 8,176 targets, KL in nats per token; position 0 in
  float behind the arrow):
                        floor             even
    rtn                 .1976 -> .1908    .1872 -> .1788
    block_hadamard      .1870 -> .1808    .2038 -> .1606
    random_hadamard     .1859 -> .1804    .1712 -> .1689    seed 0
    random_hadamard     .1897 -> .1841    .2006 -> .1718    seed 2
    smooth_hadamard     .1787 -> .1726    .1602 -> .1550
    duquantpp           .1790 -> .1738    .1593 -> .1524
  Confirmed: without position 0, `even` is better than `floor` for every recipe, and the random
  signs no longer matter much. Rows of `even` on the embedded model say as much about this one
  token as about rotations. On gutenberg-27m, which has a massive activation too, three seeds of
  random_hadamard lie within .003 (results/gutenberg27m.md).
"""

import argparse
import dataclasses

import numpy as np
from jaxtyping import Array

from duquantpp_jax.checkpoints import testbed
from duquantpp_jax.core import Format
from duquantpp_jax.evaluation.predict import Predictor, Reference
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.ptq.calibration import calibrate
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.site import QuantizedLinear, QuantizedSite, quantize_input
from duquantpp_jax.ptq.walk import quantize_decoder
from duquantpp_jax.recipes import recipe

CASES = (
    ("rtn", 0),
    ("block_hadamard", 0),
    ("random_hadamard", 0),
    ("random_hadamard", 2),
    ("smooth_hadamard", 0),
    ("duquantpp", 0),
)


@dataclasses.dataclass(frozen=True)
class PositionZeroInFloat(QuantizedLinear):
    """The quantized linear, its input at position 0 moved but not rounded."""

    def quantized(self, x: Array, state: QuantizedSite, format: Format) -> Array:
        moved = state.transform.activations(x)
        return quantize_input(x, state, format).at[:, 0].set(moved[:, 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16 * TARGETS)
    rows = parser.parse_args().tokens // TARGETS
    model = testbed.load()
    calibration = testbed.calibration_rows()[:, :-1]
    stats = calibrate(model, calibration)
    tokens = testbed.evaluation_rows()[:rows]
    float_model = Reference(Predictor(model), tokens, keep_bytes=2**30)
    for name, seed in CASES:
        for rule in ("floor", "even"):
            method = recipe(name, rule)
            plan = Plan.of(model.config, method, seed=seed)
            *_, state = quantize_decoder(plan, model, calibration, stats=stats)
            everywhere, but_zero = (
                Predictor(model, linear(method.activation_format), state)
                for linear in (QuantizedLinear, PositionZeroInFloat)
            )
            kl, kl_but_zero = (
                np.mean(float_model.row_sums(predictor).kl / TARGETS)
                for predictor in (everywhere, but_zero)
            )
            print(f"{name:16s} seed {seed} {rule:6s} {kl:.4f} -> {kl_but_zero:.4f}", flush=True)


if __name__ == "__main__":
    main()
