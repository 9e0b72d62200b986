"""Regression on what the quantized model gives: nearer to the float model than rounding alone."""

import numpy as np
import pytest

from duquantpp_jax.checkpoints import load, testbed
from duquantpp_jax.evaluation.predict import Predictor, Reference
from duquantpp_jax.models import SITES
from duquantpp_jax.ptq.asymmetric import quantize_asymmetric
from duquantpp_jax.ptq.calibration import calibrate
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.walk import fit_decoder, quantize_decoder
from duquantpp_jax.recipes import recipe


@pytest.mark.slow
def test_rows_that_it_did_not_see_diverge_less_than_with_rounding_alone():
    model = load(testbed.directory())
    rows = testbed.calibration_rows()[:24, :256]
    one = recipe("block_hadamard", "floor", "rtn")
    plan = Plan.of(model.config, one)
    stats = calibrate(model, rows[:16, :-1], plan.widths(0))
    fits = fit_decoder(plan, model, stats)
    *_, state = quantize_decoder(plan, model, rows[:16, :-1], stats=stats)
    reference = Reference(Predictor(model), rows[16:], keep_bytes=2**30)

    def divergence(state):
        predictor = Predictor(model, plan.linear, state)
        return reference.row_sums(predictor).kl.mean()

    plain = divergence(state)
    moved = quantize_asymmetric(model, one, rows[:16, :-1], fits)
    assert divergence(moved) < plain
    # With no room to move the regression changes nothing, whatever rows it sees.
    kept = quantize_asymmetric(model, one, rows[:1, :31], fits, damping=1e9, drift=0.0)
    same = [
        np.mean(np.asarray(a.codes()) == np.asarray(b.codes()))
        for site in SITES
        for a, b in zip(kept[site].weights, state[site].weights, strict=True)
    ]
    assert min(same) > 0.999
