"""Stats are a fold; transforms chain; a core import does not reach into the rooms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax import Stats
from duquantpp_jax.transforms.basic import Smooth
from duquantpp_jax.transforms.block import BlockRotation
from duquantpp_jax.transforms.hadamard import hadamard

NEEDS = frozenset({"gram", "positions"})


def _parts(sample_limit=10):
    x = jax.random.normal(jax.random.key(0), (6, 7, 8))
    empty = Stats.init(8, 6, 7, sample_limit=sample_limit, needs=NEEDS)
    return x, empty, [empty.update(x[i : i + 2], jnp.int32(7 * i)) for i in (0, 2, 4)]


def _same(a, b, tolerance):
    for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance)


def test_merge_is_associative_and_commutative():
    _, _, (a, b, c) = _parts()
    _same(a.merge(b).merge(c), a.merge(b.merge(c)), 1e-5)
    _same(a.merge(b), b.merge(a), 0)


def test_merge_of_parts_is_one_update_and_one_update_is_many():
    x, empty, (a, b, c) = _parts()
    whole = empty.update(x, jnp.int32(0))
    _same(a.merge(b).merge(c), whole, 1e-5)
    running = empty
    for i in (0, 2, 4):
        running = running.update(x[i : i + 2], jnp.int32(7 * i))
    _same(running, whole, 1e-5)


def test_empty_stats_are_the_unit_of_merge():
    _, empty, (a, _, _) = _parts()
    _same(empty.merge(a), a, 0)


def test_stats_hold_what_they_say():
    x, empty, _ = _parts(sample_limit=10)
    stats = empty.update(x, jnp.int32(0))
    tokens = np.asarray(x).reshape(-1, 8)
    assert int(stats.count) == 42
    assert stats.stride == 5  # 42 tokens, at most 10 of them
    np.testing.assert_array_equal(stats.sample, tokens[::5])
    np.testing.assert_array_equal(stats.absmax, np.abs(tokens).max(axis=0))
    np.testing.assert_allclose(stats.gram, tokens.T @ tokens, atol=1e-4)
    np.testing.assert_allclose(stats.position_sum, np.asarray(x).sum(axis=0), atol=1e-5)


def test_the_gram_and_positions_are_kept_only_where_asked_for():
    empty = Stats.init(8, 6, 7)
    assert empty.gram is None
    assert empty.position_sum is None


@pytest.mark.parametrize("kind", ["smooth", "rotation"])
def test_stats_through_a_transform_are_the_stats_of_the_moved_tokens(kind):
    x = jax.random.normal(jax.random.key(0), (4, 8, 64))
    if kind == "smooth":
        transform = Smooth(jnp.exp(jax.random.normal(jax.random.key(1), (64,))))
    else:
        transform = BlockRotation(hadamard(32)[None])
    empty = Stats.init(64, 4, 8, needs=NEEDS)
    moved = empty.update(x, jnp.int32(0)).through(transform)
    _same(moved, empty.update(transform.activations(x), jnp.int32(0)), 1e-5)


def test_smoothing_moves_maxima_exactly_even_where_the_sample_misses_them():
    x = jnp.ones((1, 4, 32)).at[0, 1, 3].set(100.0)
    stats = Stats.init(32, 1, 4, sample_limit=2).update(x, jnp.int32(0))
    assert float(jnp.max(stats.sample)) == 1.0
    moved = stats.through(Smooth(jnp.full(32, 2.0)))
    assert float(moved.absmax[3]) == 50.0
