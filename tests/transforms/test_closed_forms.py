"""Smoothing, WUSH and principal axes against their defining properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.core import stack
from duquantpp_jax.core.notices import about
from duquantpp_jax.recipes import recipe
from duquantpp_jax.transforms.basic import FitSmooth, _smooth_scale
from duquantpp_jax.transforms.pca import FitPca
from duquantpp_jax.transforms.wush import FitWush, wush
from tests.conftest import heavy_tails, stats_of

KEY = jax.random.key(3)


def _site(width=64):
    x = heavy_tails(4.0, (4, 64, width)) * jnp.exp(jax.random.normal(jax.random.key(1), (width,)))
    keys = jax.random.split(jax.random.key(2), 2)
    return (jax.random.normal(keys[0], (48, width)), jax.random.normal(keys[1], (16, width))), x


def _fit(fit, weights, x):
    return fit(weights, stats_of(x), recipe("rtn", "floor"), KEY).transform


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothing_is_its_equation(alpha):
    weights, x = _site()
    scale = _fit(FitSmooth(alpha=alpha), weights, x).scale
    x_max = np.abs(np.asarray(x, np.float64)).reshape(-1, 64).max(axis=0)
    w_max = np.abs(np.asarray(stack(weights), np.float64)).max(axis=0)
    np.testing.assert_allclose(scale, x_max**alpha / w_max ** (1 - alpha), rtol=1e-5)


def test_smoothing_half_way_balances_the_maxima():
    weights, x = _site()
    smooth = _fit(FitSmooth(alpha=0.5), weights, x)
    x_max = jnp.max(jnp.abs(smooth.activations(x)), axis=(0, 1))
    w_max = jnp.max(jnp.abs(smooth.weights(stack(weights))), axis=0)
    np.testing.assert_allclose(x_max, w_max, rtol=1e-5)


def test_the_released_smoothing_reads_the_first_weight_alone():
    weights, x = _site()
    released = _fit(FitSmooth(weight_max="first"), weights, x).scale
    np.testing.assert_array_equal(released, _fit(FitSmooth(), weights[:1], x).scale)
    assert bool(jnp.any(released != _fit(FitSmooth(), weights, x).scale))


def test_smoothing_floors_dead_channels():
    weights, x = _site()
    scale = _fit(FitSmooth(), weights, x.at[..., 5].set(0.0)).scale
    assert float(scale[5]) >= 1e-5
    released = _fit(FitSmooth(floor=1e-2), weights, x.at[..., 5].set(0.0)).scale
    assert float(released[5]) == pytest.approx(1e-2)


def test_another_alpha_compiles_nothing():
    weights, x = _site()
    compiled = _smooth_scale._cache_size
    _fit(FitSmooth(alpha=0.3), weights, x), _fit(FitSmooth(alpha=jnp.float32(0.3)), weights, x)
    before = compiled()
    for alpha in (0.4, 0.7, jnp.float32(0.1), jnp.float32(0.9)):
        wanted = _fit(FitSmooth(alpha=alpha), weights, x).scale
        np.testing.assert_allclose(wanted, _fit(FitSmooth(alpha=float(alpha)), weights, x).scale)
    assert compiled() == before


def damped(moment, damping):
    """By the docstring of wush.py: in units of the mean diagonal."""
    return moment + damping * np.mean(np.diag(moment)) * np.eye(len(moment))


@pytest.mark.parametrize("damping", [1e-6, 1e-3])
def test_wush_makes_both_damped_second_moments_equal_and_even(damping):
    weights, x = _site()
    transform = _fit(FitWush(damping=damping), weights, x)
    tokens, w = np.asarray(x, np.float64).reshape(-1, 64), np.asarray(stack(weights), np.float64)
    forward = np.asarray(transform.matrices, np.float64)
    back = np.swapaxes(np.asarray(transform.inverses, np.float64), 1, 2)
    for block in (0, 1):
        part = slice(32 * block, 32 * block + 32)
        x_moment = damped(tokens[:, part].T @ tokens[:, part] / len(tokens), damping)
        w_moment = damped(w[:, part].T @ w[:, part] / len(w), damping)
        moved_x = forward[block].T @ x_moment @ forward[block]
        moved_w = back[block].T @ w_moment @ back[block]
        np.testing.assert_allclose(moved_x, moved_w, atol=2e-4 * np.trace(moved_x) / 32)
        np.testing.assert_allclose(np.diag(moved_x), np.trace(moved_x) / 32, rtol=2e-4)


def test_wush_survives_dead_and_massive_channels():
    weights, x = _site()
    x = x.at[..., 3].set(0.0).at[0, 0, 7].set(1e4)
    transform = _fit(FitWush(), weights, x)
    moved = transform.activations(x) @ transform.weights(stack(weights)).T
    assert bool(jnp.all(jnp.isfinite(moved)))
    wanted = x @ stack(weights).T
    error = jnp.linalg.norm(moved - wanted) / jnp.linalg.norm(wanted)
    assert float(error) < 1e-3


def test_wush_raises_its_damping_with_a_warning_and_counts_what_is_not_finite(caplog):
    ones = np.ones((1, 32, 32))
    wush(ones, ones, 1e-3)
    assert caplog.messages == []
    with about("layer 3"):
        forward, back = wush(ones, ones, 1e-18)
    np.testing.assert_allclose(forward[0] @ back[0], np.eye(32), atol=1e-3)
    assert caplog.messages[0].startswith("layer 3: WUSH: damping raised from 1e-18 to 1e-1")
    with pytest.raises(ValueError, match=r"^the second moments .* cannot be factorized"):
        wush(ones, -1e3 * np.eye(32)[None], 1e-3)
    spoilt = ones.copy()
    spoilt[0, 2] = np.inf
    says = r"layer 3: .* in 0 numbers of the input's and 32 of the weights'"
    with pytest.raises(ValueError, match=says), about("layer 3"):
        wush(ones, spoilt, 1e-3)


@pytest.mark.parametrize("bound", [1.01, 2.0, 5.0])
def test_conditioned_wush_takes_the_least_damping_that_meets_the_bound(bound, caplog):
    weights, x = _site()
    x = x.at[..., 7].multiply(1150.0)
    caplog.set_level("INFO", "duquantpp_jax")
    matrices = np.asarray(_fit(FitWush(max_condition=bound), weights, x).matrices, np.float64)
    assert np.all(np.linalg.cond(matrices) <= bound * (1 + 1e-5))
    assert f"2 blocks, for a condition number of {bound:g}" in caplog.messages[0]
    dampings = 1e-3 * 10 ** (np.arange(60) / 4)
    for block in (0, 1):
        for damping in dampings:
            same = np.asarray(_fit(FitWush(damping=damping), weights, x).matrices[block])
            if np.linalg.cond(np.asarray(same, np.float64)) <= bound:
                break
        np.testing.assert_allclose(matrices[block], same, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bound", [1.0, 0.0, float("nan")])
def test_a_condition_that_cannot_be_met_is_refused(bound):
    weights, x = _site()
    with pytest.raises(ValueError, match=r"it must be 1\.01 or more"):
        _fit(FitWush(max_condition=bound), weights, x)


def test_principal_axes_decorrelate_each_block_largest_first():
    weights, x = _site()
    moved = np.asarray(_fit(FitPca(), weights, x).activations(x), np.float64).reshape(-1, 2, 32)
    for block in (0, 1):
        moment = moved[:, block].T @ moved[:, block]
        variances = np.diag(moment)
        assert np.all(np.diff(variances) <= 0)
        np.testing.assert_allclose(moment, np.diag(variances), atol=1e-5 * variances[0])


def test_hadamard_after_the_principal_axes_makes_channels_alike():
    weights, x = _site()
    moved = np.asarray(_fit(FitPca(hadamard=True), weights, x).activations(x), np.float64)
    energy = np.mean(moved.reshape(-1, 2, 32) ** 2, axis=0)
    np.testing.assert_allclose(energy, energy.mean(axis=1, keepdims=True) * np.ones(32), rtol=1e-4)
