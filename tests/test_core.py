"""Stats are a fold; transforms chain; a core import does not reach into the rooms."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from duquantpp_jax import Stats
from duquantpp_jax.core import Chain, Fitted, Needs
from duquantpp_jax.recipes import recipe
from duquantpp_jax.transforms.basic import FitInTurn, Identity, Permute, Smooth
from duquantpp_jax.transforms.block import BlockAffine, BlockRotation, multiply_blocks
from duquantpp_jax.transforms.hadamard import hadamard

RECIPE = recipe("rtn", "floor")
NEEDS = Needs.GRAM | Needs.POSITIONS


def _parts(sample_limit=10):
    x = jax.random.normal(jax.random.key(0), (6, 7, 8))
    empty = Stats.init(8, 6, 7, sample_limit=sample_limit, needs=NEEDS)
    return x, empty, [empty.update(x[i : i + 2], jnp.int32(7 * i)) for i in (0, 2, 4)]


def _same(a, b, tolerance):
    for mine, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(mine, other, rtol=tolerance, atol=tolerance)


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
    halved = Smooth(jnp.full(32, 2.0))
    turned = Chain((halved, Permute(jnp.arange(32)[::-1])))
    assert float(stats.through(halved).absmax[3]) == 50.0
    assert float(stats.through(turned).absmax[28]) == 50.0


def _moves(seed):
    """A random matrix of two blocks, and its inverse."""
    a = np.eye(32) + 0.3 * np.random.default_rng(seed).normal(size=(2, 32, 32)) / 6
    return BlockAffine(jnp.float32(a), jnp.asarray(np.linalg.inv(a), jnp.float32))


def _normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_fits_compose_their_transforms_and_the_later_weights_replace_the_earlier():
    x, mine, theirs = _normal(0, 5, 64), _normal(1, 7, 64), _normal(2, 7, 64)
    first, second = Fitted(_moves(1), (mine,)), Fitted(_moves(2), (theirs,))
    both = first.then(second)
    moved = first.transform.activations(x)
    _same(both.transform.activations(x), second.transform.activations(moved), 1e-5)
    # The later weights belong to the moved input: there, and here, they give the same outputs.
    _same(x @ both.weights[0].T, moved @ theirs.T, 1e-3)
    _same(both.transform.weights(both.weights[0]), second.transform.weights(theirs), 1e-4)
    _same(first.then(Fitted(_moves(2))).weights[0], mine, 0)
    assert Fitted(_moves(1)).then(Fitted(_moves(2))).weights is None


@pytest.mark.parametrize("name", ["clip", "scale_offset"])
def test_a_clip_survives_what_keeps_channels_and_is_refused_by_what_mixes_them(name):
    value = jnp.float32([0.5, 0.25]) if name == "clip" else jnp.int32([1, -1])
    first = Fitted(_moves(1), **{name: value})
    smooth = Smooth(jnp.full(64, 2.0))
    kept = first.then(Fitted(smooth.then(Identity())))
    np.testing.assert_array_equal(getattr(kept, name), value)
    with pytest.raises(ValueError, match=f"the {name} of an earlier fit.*BlockAffine mixes"):
        first.then(Fitted(_moves(2)))
    with pytest.raises(ValueError, match="Chain mixes"):
        first.then(Fitted(smooth.then(_moves(2))))
    last = Fitted(smooth).then(Fitted(_moves(2), **{name: value}))
    np.testing.assert_array_equal(getattr(last, name), value)


@dataclasses.dataclass(frozen=True)
class _Doubled:
    """Gives twice the weights, and a clip; keeps in `seen` what it was given."""

    seen: list
    needs = Needs.NOTHING

    def __call__(self, weights, stats, recipe, key):
        self.seen.append(weights)
        return Fitted(Identity(), tuple(2 * w for w in weights), jnp.float32([0.5, 0.5]))


@dataclasses.dataclass(frozen=True)
class _Gives:
    """Gives what it holds."""

    fitted: Fitted
    needs = Needs.NOTHING

    def __call__(self, weights, stats, recipe, key):
        return self.fitted


def test_fits_in_turn_lose_neither_weights_nor_clips():
    w, stats = _normal(1, 7, 64), Stats.init(64, 1, 1)
    given = ((w,), stats, RECIPE, jax.random.key(0))
    smooth = Fitted(Smooth(jnp.full(64, 4.0)))
    doubled = _Doubled([])
    fitted = FitInTurn((_Gives(smooth), doubled, doubled))(*given)
    np.testing.assert_array_equal(fitted.weights[0], 4 * w)
    np.testing.assert_array_equal(doubled.seen[1][0], 8 * w)  # moved by 4, doubled by the earlier
    np.testing.assert_array_equal(fitted.clip, [0.5, 0.5])
    with pytest.raises(ValueError, match="fit the clip last"):
        FitInTurn((doubled, _Gives(Fitted(_moves(2)))))(*given)


def test_what_is_to_be_kept_is_said_in_needs_and_nothing_else():
    init = inspect.unwrap(Stats.init.__func__)  # as it is without the type checks of these tests
    for wrong in ({"grams"}, frozenset({"gram"}), "gram", None, 1):
        with pytest.raises(ValueError, match=r"give Needs, as in Needs\.GRAM \| Needs\.POSITIONS"):
            init(Stats, 8, 1, 1, needs=wrong)


def test_whoever_misses_something_is_named():
    empty = Stats.init(8, 1, 1, needs=Needs.POSITIONS)
    assert empty.require(Needs.POSITIONS, "a fit").shape == (1, 8)
    with pytest.raises(ValueError, match=r"WUSH needs Needs\.GRAM, which these Stats do not hold"):
        empty.require(Needs.GRAM, "WUSH")


def test_shapes_in_signatures_and_dataclasses_are_checked_while_tests_run(request):
    """tests/__init__.py, where pytest is asked for it; what has no shape is left as it is."""
    if not request.config.getoption("jaxtyping_packages"):
        pytest.skip("types in signatures are not checked in this run")
    x, rotations = jnp.ones((3, 64)), jnp.broadcast_to(jnp.eye(32), (2, 32, 32))
    assert multiply_blocks(x, rotations).shape == x.shape
    with pytest.raises(jaxtyping.TypeCheckError, match="multiply_blocks"):
        multiply_blocks(x, rotations[0])
    with pytest.raises(jaxtyping.TypeCheckError, match="BlockRotation"):
        BlockRotation(rotations.astype(jnp.int32))
    with pytest.raises(jaxtyping.TypeCheckError, match=r"Stats\.update|update"):
        Stats.init(8, 1, 1).update(x, jnp.int32(0))
    assert not hasattr(recipe, "__wrapped__")
