"""Rotations that know nothing of the data: Hadamard of every order, sequency, DCT, Haar."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.stats

from duquantpp_jax import MXFP4
from duquantpp_jax.core import Needs
from duquantpp_jax.recipes import recipe
from duquantpp_jax.transforms.block import BlockRotation, KroneckerRotation, rotation_size
from duquantpp_jax.transforms.dct import dct
from duquantpp_jax.transforms.haar import FitHaar
from duquantpp_jax.transforms.hadamard import FitHadamard, hadamard, hadamard_factors, sequency
from duquantpp_jax.transforms.paley import paley
from tests.conftest import heavy_tails, stats_of

KEY = jax.random.key(3)


def _fit(fit, width, key=KEY):
    stats = stats_of(jnp.ones((1, 8, width)), Needs.NOTHING)
    return fit((jnp.ones((2, width)),), stats, recipe("rtn", "floor"), key).transform


@pytest.mark.parametrize("order", [4, 8, 12, 20, 28, 36, 52, 76, 100, 108, 148, 244, 252, 344])
def test_paleys_matrices_are_signs_with_orthogonal_rows(order):
    signs = paley(order)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    np.testing.assert_array_equal(signs @ signs.T, order * np.eye(order))


def test_every_order_below_240_is_known_but_eight():
    missing = [92, 116, 156, 172, 184, 188, 232, 236]
    assert [n for n in range(4, 240, 4) if not _known(n)] == missing


def _known(size):
    try:
        return len(hadamard(size)) == size
    except ValueError:
        return False


@pytest.mark.parametrize("order", [-4, 0, 1, 2, 6, 16, 30])
def test_paley_gives_nothing_for_orders_that_it_cannot(order):
    assert paley(order) is None


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 32, 56, 96, 128, 172 * 2, 640])
def test_hadamard_is_orthogonal_and_even(size):
    h = np.asarray(hadamard(size), np.float64)
    np.testing.assert_allclose(h @ h.T, np.eye(size), atol=1e-6)
    np.testing.assert_allclose(np.abs(h), size**-0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "says"), [(0, "nearest are 1"), (33, "32 and 36"), (92, "88 and 96")]
)
def test_sides_without_a_known_matrix_name_the_nearest(size, says):
    with pytest.raises(ValueError, match=f"side {size} is known here: .*({says})"):
        hadamard(size)


@pytest.mark.parametrize("size", [1, 12, 64, 128, 256, 896, 1536])
def test_the_fast_path_equals_the_matrix(size):
    factors = hadamard_factors(size)
    assert np.prod([len(f) for f in factors]) == size
    x = jnp.asarray(np.random.default_rng(size).normal(size=(5, 2 * size)), jnp.float32)
    fast = KroneckerRotation(factors).activations(x)
    dense = BlockRotation(hadamard(size)[None]).activations(x)
    # Each side sums at most `size` products, rounded once each: a few standard deviations.
    bound = 6 * np.sqrt(size) * 2.0**-24 * np.abs(x).max()
    np.testing.assert_allclose(fast, dense, atol=bound)


@pytest.mark.parametrize("width", [4096, 14336, 11008, 13824, 28672])
def test_widths_of_real_models_are_rotated_whole_without_a_matrix_of_their_size(width):
    transform = _fit(FitHadamard(size=None), width)
    terms = transform.cost(width).multiply_adds
    assert terms < 400
    spread = transform.activations(jnp.eye(1, width, 7))
    np.testing.assert_allclose(np.abs(spread), width**-0.5, rtol=1e-5)
    back = transform.inverse().activations(spread)
    np.testing.assert_allclose(back, np.eye(1, width, 7), atol=2 * terms * 2.0**-24)


def test_a_width_without_a_hadamard_matrix_is_refused():
    with pytest.raises(ValueError, match="no Hadamard matrix of side 30 "):
        _fit(FitHadamard(size=None), 30)


def test_random_signs_differ_by_block_and_follow_the_key():
    fit = FitHadamard(random_signs=True)
    a = _fit(fit, 64).matrices
    np.testing.assert_allclose(jnp.abs(a), 32**-0.5, rtol=1e-6)
    assert bool(jnp.any(a[0] != a[1]))
    assert bool(jnp.any(a != _fit(fit, 64, jax.random.key(4)).matrices))
    np.testing.assert_array_equal(a, _fit(fit, 64).matrices)


def test_random_signs_at_full_width_are_those_of_the_matrix():
    fast = _fit(FitHadamard(size=256, random_signs=True), 512)
    signs = jnp.sign(fast.links[0].scale)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 512)), jnp.float32)
    dense = BlockRotation(signs.reshape(2, 256, 1) * hadamard(256))
    np.testing.assert_allclose(fast.activations(x), dense.activations(x), atol=1e-5)
    assert set(np.unique(signs)) == {-1.0, 1.0}


@pytest.mark.parametrize("size", [2, 8, 32, 128])
def test_sequency_order_sorts_sylvesters_rows_by_their_changes_of_sign(size):
    walsh = sequency(hadamard(size))
    changes = np.count_nonzero(np.diff(np.sign(walsh), axis=1), axis=1)
    np.testing.assert_array_equal(changes, np.arange(size))
    np.testing.assert_array_equal(walsh, walsh.T)


@pytest.mark.slow
def test_sequency_within_the_block_rounds_as_the_natural_order_does():
    x = heavy_tails(3.0, (50, 64))
    error = {}
    for order in ("natural", "sequency"):
        moved = _fit(FitHadamard(order=order), 64).activations(x)
        error[order] = jnp.sum(jnp.square(moved - MXFP4().fake_quantize(moved)), axis=-1)
    np.testing.assert_allclose(error["natural"], error["sequency"], rtol=1e-4)


@pytest.mark.parametrize("size", [1, 8, 32])
def test_the_dct_is_that_of_scipy(size):
    x = np.random.default_rng(size).normal(size=(4, size))
    wanted = scipy.fft.dct(x, type=2, norm="ortho", axis=-1)
    np.testing.assert_allclose(x @ np.asarray(dct(size), np.float64), wanted, atol=1e-6)


def test_haar_rotations_are_uniform_and_differ_by_block():
    matrices = np.asarray(_fit(FitHaar(size=8), 8 * 500).matrices)
    # The square of an entry of a uniform unit vector in n dimensions is Beta(1/2, (n - 1)/2),
    # of either sign; QR without fixed signs would make the diagonal one-sided.
    for i, j in ((0, 0), (3, 3), (2, 5)):
        entry = matrices[:, i, j]
        assert scipy.stats.kstest(entry**2, scipy.stats.beta(0.5, 3.5).cdf).pvalue > 1e-3
        assert scipy.stats.binomtest(int(np.sum(entry > 0)), len(entry)).pvalue > 1e-3
    assert len(np.unique(matrices[:, 0, 0])) == 500


@pytest.mark.parametrize("size", [0, 48, 128])
def test_a_rotation_size_that_does_not_divide_the_width_is_refused(size):
    with pytest.raises(ValueError, match=f"rotation size {size} does not divide the width 64: "):
        rotation_size(size, 64)


def test_a_kronecker_product_of_another_width_is_refused():
    with pytest.raises(ValueError, match="any multiple of 256 channels: got 96"):
        KroneckerRotation(hadamard_factors(256)).activations(jnp.ones((2, 96)))
