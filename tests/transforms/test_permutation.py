"""Permutations deal channels as they say, and are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.recipes import recipe
from duquantpp_jax.transforms.basic import Permute
from duquantpp_jax.transforms.permutation import FitPermutation, balanced, zigzag
from tests.conftest import heavy_tails, stats_of

KEY = jax.random.key(3)


def _fit(kind, x, key=KEY, size=32):
    weights = (jnp.ones((2, x.shape[-1])),)
    return FitPermutation(kind, size)(weights, stats_of(x), recipe("rtn", "floor"), key).transform


def test_zigzag_deals_in_snake_order():
    values = np.array([1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0, 0.0])
    dealt = values[zigzag(values, 3)].reshape(3, 3)
    np.testing.assert_array_equal(dealt, [[8, 3, 2], [7, 4, 1], [6, 5, 0]])


def test_zigzag_bounds_the_difference_of_block_sums():
    values = np.abs(np.random.default_rng(0).standard_cauchy(256))
    sums = values[zigzag(values, 32)].reshape(8, 32).sum(axis=1)
    assert np.ptp(sums) <= np.max(values)  # DuQuant's theorem 2: by the largest gap of two rounds


def test_balancing_gives_each_channel_to_the_lightest_block_with_room():
    mass = np.array([9.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    np.testing.assert_array_equal(mass[balanced(mass, 3)].reshape(2, 3), [[9, 3, 1], [5, 4, 2]])


def test_balancing_is_more_even_than_zigzag_and_than_chance():
    x = heavy_tails(3.0, (2, 64, 256)) * jnp.exp(jax.random.normal(KEY, (256,)))
    spread = {}
    for kind in ("mass", "zigzag", "random"):
        moved = jnp.mean(jnp.abs(_fit(kind, x).activations(x)), axis=(0, 1))
        spread[kind] = float(jnp.ptp(moved.reshape(8, 32).sum(axis=1)))
    assert spread["mass"] < spread["zigzag"] < spread["random"]


@pytest.mark.parametrize("kind", ["zigzag", "mass", "random"])
def test_every_kind_is_a_permutation_and_its_inverse_undoes_it(kind):
    x = jax.random.normal(KEY, (2, 8, 96))
    transform = _fit(kind, x)
    np.testing.assert_array_equal(np.sort(transform.order), np.arange(96))
    np.testing.assert_array_equal(transform.then(transform.inverse()).activations(x), x)


def test_random_follows_the_key():
    x = jnp.ones((1, 4, 96))
    a, b = (_fit("random", x, key).order for key in (KEY, jax.random.key(4)))
    assert bool(jnp.any(a != b))
    np.testing.assert_array_equal(a, _fit("random", x).order)


def test_channel_maxima_move_exactly():
    x = jax.random.normal(KEY, (2, 8, 64))
    stats = stats_of(x)
    transform = _fit("zigzag", x)
    np.testing.assert_array_equal(
        stats.through(transform).absmax, jnp.max(jnp.abs(transform.activations(x)), axis=(0, 1))
    )


def test_another_width_is_refused():
    with pytest.raises(ValueError, match="a permutation of 64 channels got a width of 96"):
        Permute(jnp.arange(64)).activations(jnp.ones((2, 96)))
