"""SQNR of each linear against plain NumPy, and of linears that have none."""

import jax
import numpy as np
import pytest

from duquantpp_jax.evaluation.predict import Predictor
from duquantpp_jax.evaluation.sqnr import decibels, linear_sqnr, mean_sqnr
from duquantpp_jax.models import SITES, dense
from tests.conftest import tiny_decoder


@pytest.mark.slow
def test_sqnr_is_that_of_each_linear_on_the_float_models_inputs(quantized, tokens):
    model, state = quantized.model, quantized.state
    found = linear_sqnr(quantized, tokens)
    _, inputs = jax.jit(lambda m, t: m(t, lambda s, x, w, _: (dense(s, x, w, _)[0], x)))(
        model, tokens[:, :-1]
    )
    format = dict(quantized.linear.activation_formats)["mlp_in"]
    for site in SITES:
        assert found[site].shape == (2, len(model.weights(site)))
        for number, w in enumerate(model.weights(site)):
            x = inputs[site][1]
            layer = jax.tree.map(lambda leaf: leaf[1], state[site])
            moved = format.fake_quantize(layer.transform.activations(x))
            y = np.asarray(x, np.float64) @ np.asarray(w[1], np.float64).T
            rounded = np.asarray(layer.weights[number].dequantize(), np.float64)
            error = y - np.asarray(moved, np.float64) @ rounded.T
            wanted = 10 * np.log10((y**2).sum() / (error**2).sum())
            np.testing.assert_allclose(found[site][1, number], wanted, atol=0.05)
    every = np.concatenate([sqnr.ravel() for sqnr in found.values()])
    assert mean_sqnr(quantized, tokens) == pytest.approx(float(every.mean()))


def test_silence_and_exactness_have_no_sqnr_and_nan_is_not_hidden():
    found = decibels(np.float32([0, 10, 10, 1, np.nan]), np.float32([1, 0, 1, 0, 1]))
    assert found.mask.tolist() == [True, True, False, True, False]
    assert found[2] == pytest.approx(10)
    assert np.isnan(found[4])


def test_a_model_that_is_exact_everywhere_has_no_mean(tokens):
    assert mean_sqnr(Predictor(tiny_decoder()), tokens) is None
