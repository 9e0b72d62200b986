"""The greedy search equals a plain NumPy replay, and the base rotation is what it should be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.core import Stats
from duquantpp_jax.recipes import FITS, recipe
from duquantpp_jax.transforms import duquant
from duquantpp_jax.transforms.duquant import (
    FitDuquantpp,
    base_rotation,
    greedy_search,
    mixed_rotations,
)
from duquantpp_jax.transforms.hadamard import hadamard
from tests.conftest import heavy_tails, stats_of


def replay(x, rotations, steps, index, criterion):
    """The equations of duquant.py, one step after another in float64."""
    n = x.shape[1]
    product, best = np.eye(n), np.eye(n)
    least = score = criterion(x)
    for k in range(steps):
        row, channel = divmod(int(np.argmax(np.abs(x))), n)
        d = channel if index == "channel" else row % n
        order = np.arange(n)
        order[[0, d]] = order[[d, 0]]
        s = rotations[min(k, len(rotations) - 1)][np.ix_(order, order)]
        x, product = x @ s, product @ s
        score = criterion(x)
        if score < least:
            best, least = product, score
    return best, least


CRITERIA = {"absmax": lambda x: np.abs(x).max(), "range": np.ptp}


@pytest.mark.parametrize("index", ["channel", "released"])
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("draws", [1, 20])
def test_greedy_search_equals_the_plain_loop(index, criterion, draws):
    x = heavy_tails(2.5, (40, 8))
    rotations = mixed_rotations(jax.random.key(1), draws, 8, "left")
    best, least = greedy_search(x, rotations, steps=20, index=index, criterion=criterion)
    wanted, wanted_least = replay(
        np.asarray(x, np.float64), np.asarray(rotations, np.float64), 20, index, CRITERIA[criterion]
    )
    np.testing.assert_allclose(best, wanted, atol=1e-5)
    np.testing.assert_allclose(least, wanted_least, rtol=1e-5)


@pytest.mark.slow
def test_the_kept_criterion_is_that_of_the_moved_tokens_and_at_most_the_first():
    x = heavy_tails(2.5, (64, 32))
    rotations = mixed_rotations(jax.random.key(1), 16, 32, "left")
    format = recipe("rtn", "floor").activation_format
    error = lambda x: jnp.mean(jnp.square(x - format.fake_quantize(x)))  # noqa: E731
    for criterion, score in {"absmax": lambda x: jnp.max(jnp.abs(x)), "mse": error}.items():
        best, least = greedy_search(x, rotations, steps=16, criterion=criterion, format=format)
        np.testing.assert_allclose(score(x @ best), least, rtol=1e-3)
        assert float(least) <= float(score(x))


@functools.cache
def _searching(many):
    """The search, compiled once for each MANY_ROWS."""
    return jax.jit(lambda x, rotations: greedy_search(x, rotations, steps=12))


@pytest.mark.parametrize("tokens", ["normal", "tails", "massive", "duplicate", "dead", "nan"])
def test_rows_that_are_left_out_change_no_bit(tokens, monkeypatch):
    # Integers, and matrices of +-1/2: all sums are exact, in whatever order a machine adds them.
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.round(4 * rng.normal(size=(67, 8))), jnp.float32)
    x = {
        "normal": x,
        "tails": jnp.clip(jnp.round(4 * heavy_tails(2.0, (67, 8))), -999, 999),
        "massive": x.at[5, 3].set(1150.0),
        "duplicate": x.at[33:66].set(x[:33]),
        "dead": x.at[9:].set(0.0),
        "nan": x.at[5, 3].set(jnp.nan),
    }[tokens]
    signs = jnp.asarray(rng.choice([-1.0, 1.0], (12, 8, 1)), jnp.float32)
    rotations = signs * jnp.kron(jnp.eye(2, dtype=jnp.float32), hadamard(4))
    found = []
    for many in (1, 10**9):
        monkeypatch.setattr(duquant, "MANY_ROWS", many)
        found.append(_searching(many)(x, rotations))
    for few, all_rows in zip(*found, strict=True):
        np.testing.assert_array_equal(few, all_rows)


def test_no_step_is_taken_where_none_helps():
    x = jnp.ones((4, 8)).at[0, 0].set(1.0)  # every magnitude equal: a rotation only makes peaks
    rotations = mixed_rotations(jax.random.key(0), 5, 8, "left")
    best, least = greedy_search(x, rotations, steps=5)
    np.testing.assert_array_equal(best, np.eye(8))
    assert float(least) == 1.0


@pytest.mark.parametrize("size", [2, 8, 32, 128])
def test_the_base_rotation_is_orthogonal_and_its_first_row_even(size):
    base = base_rotation(size)
    np.testing.assert_allclose(base @ base.T, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(np.abs(base[0]), size**-0.5, atol=1e-12)


def test_left_mixing_keeps_the_even_row_and_right_mixing_destroys_it():
    left, right = (mixed_rotations(jax.random.key(0), 50, 32, side) for side in ("left", "right"))
    np.testing.assert_allclose(jnp.abs(left[:, 0]), 32**-0.5, atol=1e-6)
    assert 0.36 < float(jnp.mean(jnp.max(jnp.abs(right[:, 0]), axis=-1))) < 0.46


@pytest.mark.parametrize("name", ["greedy", "greedy_mse", "greedy_released"])
def test_fitted_rotations_are_orthogonal(name):
    x = heavy_tails(3.0, (1, 100, 64))
    stats = stats_of(x)
    fitted = FITS[name]((jnp.ones((3, 64)),), stats, recipe(name, "floor"), jax.random.key(2))
    matrices = fitted.transform.matrices
    product = jnp.einsum("bij,bkj->bik", matrices, matrices)
    np.testing.assert_allclose(product, jnp.broadcast_to(jnp.eye(32), product.shape), atol=1e-5)
    assert matrices.shape[0] == (1 if name == "greedy_released" else 2)


@pytest.mark.slow
def test_per_block_fits_each_block_as_if_alone():
    x = heavy_tails(3.0, (1, 100, 64))
    fit = FitDuquantpp(steps=12)
    both = fit((jnp.ones((3, 64)),), stats_of(x), recipe("greedy", "floor"), jax.random.key(2))
    for block in (0, 1):
        alone = fit(
            (jnp.ones((3, 32)),),
            stats_of(x[..., 32 * block : 32 * block + 32]),
            recipe("greedy", "floor"),
            jax.random.key(2),
        )
        np.testing.assert_allclose(
            both.transform.matrices[block], alone.transform.matrices[0], atol=1e-6
        )


@pytest.mark.slow
def test_averaged_calibration_searches_the_mean_over_rows():
    x = heavy_tails(3.0, (5, 40, 32))
    averaged = dataclasses.replace(FITS["greedy_released"], steps=10)
    pooled = dataclasses.replace(averaged, averaged=False)
    weights, key, method = (jnp.ones((3, 32)),), jax.random.key(2), recipe("greedy", "floor")
    mean = Stats.init(32, 1, 40).update(jnp.mean(x, axis=0, keepdims=True), jnp.int32(0))
    np.testing.assert_allclose(
        averaged(weights, stats_of(x), method, key).transform.matrices,
        pooled(weights, mean, method, key).transform.matrices,
        atol=1e-5,
    )


def test_the_best_of_several_seeds_is_at_most_the_first_for_every_block():
    x = heavy_tails(3.0, (1, 100, 64))
    method, key = recipe("greedy", "floor"), jax.random.key(2)
    kept = {}
    for seeds in (1, 4):
        fit = FitDuquantpp(steps=12, seeds=seeds)
        transform = fit((jnp.ones((3, 64)),), stats_of(x), method, key).transform
        moved = transform.activations(x[0])
        kept[seeds] = np.abs(moved).reshape(100, 2, 32).max(axis=(0, 2))
    assert np.all(kept[4] <= kept[1] * (1 + 1e-5))
    assert np.any(kept[4] < kept[1])


@pytest.mark.parametrize("size", [8, 16, 64, None])
def test_rotations_of_any_size_search_their_own_blocks(size):
    x = heavy_tails(3.0, (1, 40, 64))
    fit = FitDuquantpp(steps=10, size=size, fresh_q=False, polish=False)
    key = jax.random.key(2)
    transform = fit((jnp.ones((3, 64)),), stats_of(x), recipe("greedy", "floor"), key).transform
    side = size or 64
    assert transform.matrices.shape == (64 // side, side, side)
    rotations = np.asarray(mixed_rotations(key, 1, side, "left"), np.float64)
    for block in range(64 // side):
        tokens = np.asarray(x[0, :, block * side : (block + 1) * side], np.float64)
        wanted, _ = replay(tokens, rotations, 10, "channel", CRITERIA["absmax"])
        np.testing.assert_allclose(transform.matrices[block], wanted, atol=1e-5)


def test_polishing_moves_no_entry_by_more_than_the_drift_it_takes_away():
    x = heavy_tails(3.0, (1, 100, 64))
    raw, polished = (
        FitDuquantpp(polish=polish)(
            (jnp.ones((3, 64)),), stats_of(x), recipe("greedy", "floor"), jax.random.key(2)
        ).transform.matrices
        for polish in (False, True)
    )
    drift = orthogonality_error(raw)
    assert orthogonality_error(polished) < 2e-7 < drift
    assert float(jnp.max(jnp.abs(raw - polished))) < 2 * drift


def orthogonality_error(matrices):
    m = np.asarray(matrices, np.float64)
    return np.abs(m @ m.swapaxes(1, 2) - np.eye(m.shape[-1])).max()


def test_duquant_is_the_search_a_zigzag_and_the_search_again():
    x = heavy_tails(3.0, (2, 32, 256))
    weights, key, method = (jnp.ones((3, 256)),), jax.random.key(2), recipe("duquant", "floor")
    fitted = FITS["duquant"](weights, stats_of(x), method, key)
    smooth, first, zigzag, second = fitted.transform.flat_links()
    assert first.matrices.shape == second.matrices.shape == (2, 128, 128)
    moved = first.activations(smooth.activations(x))
    maxima = np.max(np.abs(moved), axis=(0, 1))
    for block in maxima[np.asarray(zigzag.order)].reshape(2, 128):
        # Maxima of rotated channels are the sample's, here of all tokens.
        np.testing.assert_array_equal(block, np.sort(block)[::-1])


def test_an_error_of_no_format_cannot_be_searched_for():
    with pytest.raises(ValueError, match="give the format"):
        greedy_search(jnp.ones((4, 8)), jnp.eye(8)[None], steps=1, criterion="mse")
