"""Regression on what the quantized model gives: nearer to the float model than rounding alone."""

import jax
import numpy as np
import pytest

from duquantpp_jax.checkpoints import load, testbed
from duquantpp_jax.evaluation.predict import Predictor, Reference
from duquantpp_jax.models import SITES
from duquantpp_jax.ptq.asymmetric import quantize_asymmetric
from duquantpp_jax.ptq.calibration import calibrate, site_widths
from duquantpp_jax.ptq.site import QuantizedLinear, fit_model, quantize_model
from duquantpp_jax.recipes import recipe


@pytest.mark.slow
def test_rows_that_it_did_not_see_diverge_less_than_with_rounding_alone():
    model = load(testbed.directory())
    rows = testbed.calibration_rows()[:24, :256]
    one = recipe("block_hadamard", "floor", "rtn")
    widths = site_widths(model, 32)
    weights = {site: model.weights(site) for site in SITES}
    stats = calibrate(model, rows[:16, :-1], widths)
    fits = fit_model(one, weights, stats, jax.random.key(0))

    reference = Reference(Predictor(model), rows[16:], keep_bytes=2**30)

    def divergence(state):
        predictor = Predictor(model, QuantizedLinear(one.activation_format), state)
        return reference.row_sums(predictor).kl.mean()

    plain = divergence(quantize_model(one, weights, stats, fits))
    moved = quantize_asymmetric(model, one, rows[:16, :-1], fits)
    assert divergence(moved) < plain
    # With no room to move the regression changes nothing, whatever rows it sees.
    kept = quantize_asymmetric(model, one, rows[:1, :31], fits, damping=1e9, drift=0.0)
    same = [
        np.mean(np.asarray(a.codes()) == np.asarray(b.codes()))
        for site in SITES
        for a, b in zip(
            kept[site].weights, quantize_model(one, weights, stats, fits)[site].weights, strict=True
        )
    ]
    assert min(same) > 0.999
