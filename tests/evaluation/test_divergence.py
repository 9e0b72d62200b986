"""KL, NLL and SQNR of a quantized decoder against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.evaluation.divergence import float_log_probabilities, row_divergence
from duquantpp_jax.evaluation.sqnr import linear_sqnr
from duquantpp_jax.models import SITES, dense
from duquantpp_jax.ptq.calibration import calibrate, site_widths
from duquantpp_jax.ptq.site import QuantizedLinear, fit_model, quantize_model
from duquantpp_jax.recipes import recipe
from tests.conftest import tiny_decoder


@pytest.fixture(scope="module")
def quantized():
    model = tiny_decoder()
    tokens = jax.random.randint(jax.random.key(0), (4, 512), 0, 257)
    one = recipe("block_hadamard", "floor")
    weights = {site: model.weights(site) for site in SITES}
    stats = calibrate(model, np.asarray(tokens[:, :40]), site_widths(model, 32))
    fits = fit_model(one, weights, stats, jax.random.key(0))
    return model, tokens, one, quantize_model(one, weights, stats, fits)


def test_row_sums_are_the_equations(quantized):
    model, tokens, one, state = quantized
    log_p, float_nll = float_log_probabilities(model, tokens)
    kl, nll = row_divergence(model, state, tokens, log_p, format=one.activation_format)
    linear = QuantizedLinear(one.activation_format)
    logits, _ = jax.jit(lambda m, t, s: m(t, linear, s))(model, tokens[:, :-1], state)
    logits = np.asarray(logits, np.float64)
    log_q = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    p = np.exp(np.asarray(log_p, np.float64))
    np.testing.assert_allclose(p.sum(axis=-1), 1, atol=1e-5)
    wanted = (p * (np.asarray(log_p, np.float64) - log_q)).sum(axis=(1, 2))
    np.testing.assert_allclose(kl, wanted, rtol=1e-3)
    targets = np.asarray(tokens)[:, 1:, None]
    np.testing.assert_allclose(
        nll, -np.take_along_axis(log_q, targets, -1).sum(axis=(1, 2)), rtol=1e-5
    )
    wanted_float = -np.take_along_axis(np.asarray(log_p), targets, -1).sum(axis=(1, 2))
    np.testing.assert_allclose(float_nll, wanted_float, rtol=1e-5)
    assert (np.asarray(kl) > 0).all()


def test_a_row_does_not_depend_on_the_batch_it_is_in(quantized):
    model, tokens, one, state = quantized
    log_p, _ = float_log_probabilities(model, tokens)
    together, _ = row_divergence(model, state, tokens, log_p, format=one.activation_format)
    alone, _ = row_divergence(model, state, tokens[2:3], log_p[2:3], format=one.activation_format)
    np.testing.assert_allclose(together[2], alone[0], rtol=2e-3)


@pytest.mark.slow
def test_sqnr_is_that_of_each_linear_on_the_float_models_inputs(quantized):
    model, tokens, one, state = quantized
    found = linear_sqnr(model, state, tokens, format=one.activation_format)
    _, inputs = jax.jit(lambda m, t: m(t, lambda s, x, w, _: (dense(s, x, w, _)[0], x)))(
        model, tokens[:, :-1]
    )
    for site in SITES:
        assert found[site].shape == (2, len(model.weights(site)))
        for number, w in enumerate(model.weights(site)):
            x = inputs[site][1]
            layer = jax.tree.map(lambda leaf: leaf[1], state[site])
            moved = one.activation_format.fake_quantize(layer.transform.activations(x))
            y = np.asarray(x, np.float64) @ np.asarray(w[1], np.float64).T
            rounded = np.asarray(layer.weights[number].dequantize(), np.float64)
            error = y - np.asarray(moved, np.float64) @ rounded.T
            wanted = 10 * np.log10((y**2).sum() / (error**2).sum())
            np.testing.assert_allclose(found[site][1, number], wanted, atol=0.05)


def test_an_unquantized_model_does_not_diverge():
    model = tiny_decoder()
    tokens = jax.random.randint(jax.random.key(0), (2, 512), 0, 257)
    log_p, nll = float_log_probabilities(model, tokens)
    logits, _ = jax.jit(lambda m, t: m(t))(model, tokens[:, :-1])
    same = jax.nn.log_softmax(logits)
    assert float(jnp.max(jnp.abs(same - log_p))) < 1e-5
    assert bool(jnp.all(nll > 0))
