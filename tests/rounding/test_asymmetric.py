"""Asymmetric regression: the ridge solution, and nearer to the float model than rounding alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.checkpoints import testbed
from duquantpp_jax.core import Needs, Stats
from duquantpp_jax.evaluation.predict import Predictor, Reference
from duquantpp_jax.formats import MXFP4
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.walk import quantize_decoder
from duquantpp_jax.recipes import recipe
from duquantpp_jax.rounding.asymmetric import Asymmetric, regressed
from duquantpp_jax.rounding.rtn import rtn


@pytest.fixture(scope="module")
def inputs():
    """Weights, inputs of the float path, and of the quantized one."""
    random = np.random.default_rng(0)
    x = random.standard_normal((4, 50, 64)) @ random.standard_normal((64, 64)) / 8
    w, x = (jnp.asarray(a, jnp.float32) for a in (random.standard_normal((24, 64)), x))
    return w, x, MXFP4().fake_quantize(0.9 * x)


def test_the_weights_are_those_of_the_least_squares_of_the_docstring(inputs):
    w, x, x_hat = inputs
    stats = Stats.init(64, 4, 50, needs=Needs.GRAM | Needs.CROSS).update(x_hat, jnp.int32(0), x)
    w64, x64, hat64 = (
        np.asarray(a, np.float64) for a in (w, x.reshape(-1, 64), x_hat.reshape(-1, 64))
    )
    ridge = 0.1 * np.mean(np.sum(hat64**2, axis=0))
    rows = np.concatenate([hat64, np.sqrt(ridge) * np.eye(64)])
    wanted = np.concatenate([x64 @ w64.T, np.sqrt(ridge) * w64.T])
    least = np.linalg.lstsq(rows, wanted)[0].T
    found = regressed(w, stats.gram, stats.cross, 0.1)
    np.testing.assert_allclose(found, least, atol=1e-4 * np.abs(least).max())
    rounded = Asymmetric(rounding=rtn)(w, MXFP4(), stats)
    np.testing.assert_array_equal(rounded.dequantize(), MXFP4().fake_quantize(found))
    # With no room to move the regression changes nothing.
    kept = Asymmetric(damping=1e9, rounding=rtn)(w, MXFP4(), stats)
    assert np.mean(np.asarray(kept.codes()) == np.asarray(MXFP4().quantize(w).codes())) > 0.999
    # Where the two paths are the same there is nothing to make good.
    np.testing.assert_allclose(regressed(w, stats.gram, stats.gram, 0.1), w, atol=1e-6)


def test_stats_take_both_paths_or_one_and_say_what_is_missing(inputs):
    w, x, x_hat = inputs
    single = Stats.init(64, 4, 50, needs=Needs.GRAM).update(x_hat, jnp.int32(0))
    with pytest.raises(ValueError, match=r"asymmetric needs Needs\.CROSS"):
        Asymmetric()(w, MXFP4(), single)
    with pytest.raises(ValueError, match="inputs of the float path"):
        single.update(x_hat, jnp.int32(0), x)


@pytest.mark.slow
def test_rows_that_it_did_not_see_diverge_less_than_with_rounding_alone(shallow):
    model, rows = shallow, testbed.calibration_rows()[:24, :128]
    reference = Reference(Predictor(model), rows[16:], keep_bytes=2**30)

    def quantized(rounding):
        method = recipe("block_hadamard", "floor", rounding)
        return Predictor(*quantize_decoder(Plan.of(model.config, method), model, rows[:16, :-1]))

    plain, moved = quantized("rtn"), quantized(Asymmetric(rounding=rtn))
    assert np.mean(reference.row_sums(moved).kl) < np.mean(reference.row_sums(plain).kl)
