"""The law of every transform: t.activations(x) @ t.weights(w).T == x @ w.T.

A new transform is one more entry of TRANSFORMS.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from hypothesis import given, settings
from hypothesis import strategies as st

from duquantpp_jax.core import Transform
from duquantpp_jax.transforms.basic import Identity, Permute, Smooth
from duquantpp_jax.transforms.block import BlockAffine, BlockRotation, KroneckerRotation, lower

WIDTH = 64


def _smooth(rng):
    return Smooth(jnp.asarray(np.exp(rng.normal(size=WIDTH))))


def _orthogonal(rng, count, size):
    return np.linalg.qr(rng.normal(size=(count, size, size)))[0]


def _rotation(count, size):
    return lambda rng: BlockRotation(jnp.asarray(_orthogonal(rng, count, size)))


def _affine(count, size):
    def make(rng):
        stretch = np.exp(rng.normal(size=(count, size, 1)))
        matrices = _orthogonal(rng, count, size) @ (stretch * _orthogonal(rng, count, size))
        return BlockAffine(jnp.asarray(matrices), jnp.asarray(np.linalg.inv(matrices)))

    return make


def _kronecker(rng, *sides):
    return KroneckerRotation(tuple(jnp.asarray(_orthogonal(rng, 1, n)[0]) for n in sides))


def single(transform):
    """The same with its float arrays in float32."""
    real = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    cast = lambda leaf: leaf.astype(jnp.float32) if real(leaf) else leaf  # noqa: E731
    return jax.tree.map(cast, transform)


def _lowers(name):
    return not any(word in name for word in ("full width", "permutation"))


TRANSFORMS = {
    "identity": lambda rng: Identity(),
    "smooth": _smooth,
    "rotation, one for all blocks": _rotation(1, 32),
    "rotation, one per block": _rotation(2, 32),
    "rotation, small": _rotation(8, 8),
    "rotation, full width": _rotation(1, 64),
    "affine, one for all blocks": _affine(1, 32),
    "affine, one per block": _affine(2, 32),
    "permutation": lambda rng: Permute(jnp.asarray(rng.permutation(WIDTH), jnp.int32)),
    "signs": lambda rng: Smooth(jnp.asarray(rng.choice([-1.0, 1.0], WIDTH))),
    "kronecker, full width": lambda rng: _kronecker(rng, 4, 16),
    "kronecker, in blocks": lambda rng: _kronecker(rng, 2, 4, 2),
}
names = st.sampled_from(sorted(TRANSFORMS))
seeds = st.integers(0, 2**32 - 1)


def _case(chosen, seed):
    rng = np.random.default_rng(seed)
    transform = TRANSFORMS[chosen[0]](rng)
    for name in chosen[1:]:
        transform = transform.then(TRANSFORMS[name](rng))
    x, w = rng.normal(size=(3, 5, WIDTH)), rng.normal(size=(7, WIDTH))
    return transform, jnp.asarray(x), jnp.asarray(w)


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_every_transform_moves_something_but_not_the_product(name):
    with jax.enable_x64(True):
        transform, x, w = _case([name], 0)
        moved = transform.activations(x)
        assert (name == "identity") == bool(jnp.all(moved == x))
        np.testing.assert_allclose(moved @ transform.weights(w).T, x @ w.T, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(names, min_size=1, max_size=4), seeds)
def test_chains_keep_the_product_in_float64(chosen, seed):
    with jax.enable_x64(True):
        transform, x, w = _case(chosen, seed)
        moved = transform.activations(x) @ transform.weights(w).T
        np.testing.assert_allclose(moved, x @ w.T, atol=1e-9 * _condition(transform))


@settings(max_examples=40, deadline=None)
@given(st.lists(names, min_size=1, max_size=4), seeds)
def test_chains_keep_the_product_in_float32_up_to_their_condition(chosen, seed):
    with jax.enable_x64(True):
        transform, x, w = _case(chosen, seed)
        condition = _condition(transform)
    transform, x, w = single((transform, x, w))
    moved = transform.activations(x) @ transform.weights(w).T
    # Each factor errs by at most (width + links) roundings of |x| |T| |T^-1| |w|.
    scale = float(jnp.max(jnp.linalg.norm(x, axis=-1)) * jnp.max(jnp.linalg.norm(w, axis=-1)))
    bound = 4 * len(chosen) * np.sqrt(WIDTH) * 2.0**-24 * condition * scale
    np.testing.assert_allclose(moved, x @ w.T, atol=bound)


def _condition(transform):
    eye = jnp.eye(WIDTH)
    matrix, back = transform.activations(eye), transform.inverse().activations(eye)
    return float(np.linalg.norm(matrix, 2) * np.linalg.norm(back, 2))


@settings(max_examples=30, deadline=None)
@given(st.lists(names, min_size=1, max_size=4), seeds)
def test_the_inverse_undoes_both_sides(chosen, seed):
    with jax.enable_x64(True):
        transform, x, w = _case(chosen, seed)
        there_and_back = transform.then(transform.inverse())
        tolerance = 1e-9 * _condition(transform)
        np.testing.assert_allclose(there_and_back.activations(x), x, atol=tolerance)
        np.testing.assert_allclose(there_and_back.weights(w), w, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(st.lists(names, min_size=1, max_size=4), seeds)
def test_lowering_changes_the_form_not_the_map(chosen, seed):
    with jax.enable_x64(True):
        transform, x, w = _case(chosen, seed)
        tolerance = 1e-5 * _condition(transform)
    transform, x, w = single((transform, x, w))
    lowered = lower(transform, WIDTH, 32)
    for side in ("activations", "weights"):
        moved, wanted = (
            getattr(t, side)(x if side == "activations" else w) for t in (lowered, transform)
        )
        np.testing.assert_allclose(moved, wanted, atol=tolerance, rtol=1e-5)


def test_all_that_lowers_has_one_structure():
    rng = np.random.default_rng(0)
    low = [
        lower(single(make(rng)), WIDTH, 32) for name, make in TRANSFORMS.items() if _lowers(name)
    ]
    assert len({jax.tree.structure(t) for t in low}) == 1
    shapes = {tuple(leaf.shape for leaf in jax.tree.leaves(t)) for t in low}
    assert shapes == {((64,), (2, 32, 32), (2, 32, 32))}


@pytest.mark.parametrize("name", sorted(n for n in TRANSFORMS if not _lowers(n)))
def test_what_mixes_channels_beyond_the_block_does_not_lower(name):
    transform = TRANSFORMS[name](np.random.default_rng(0))
    assert lower(transform, WIDTH, 32) is transform


@struct.dataclass
class Stranger(Transform):
    """A transform that says no more of itself than it must."""

    inner: Transform

    def activations(self, x):
        return self.inner.activations(x)

    def weights(self, w):
        return self.inner.weights(w)

    def inverse(self):
        return Stranger(self.inner.inverse())


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_the_blocks_of_a_stranger_are_seen_from_what_it_does(name):
    transform = single(TRANSFORMS[name](np.random.default_rng(0)))
    seen = Stranger(transform).as_blocks(WIDTH, 32)
    assert (seen is not None) == _lowers(name)
    if seen is not None:
        smooth, affine = lower(transform, WIDTH, 32).links
        wanted = affine.matrices / smooth.scale.reshape(-1, 32, 1)
        np.testing.assert_allclose(seen.matrices, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))
        assert Stranger(transform).as_blocks(WIDTH, 48) is None


def test_blocks_that_mix_are_seen_where_their_sum_hides_it():
    mixed = np.eye(128, dtype=np.float32)
    mixed[0, 32], mixed[64, 32] = 1e-3, -1e-3
    inverse = np.linalg.inv(mixed)
    affine = BlockAffine(jnp.asarray(mixed[None]), jnp.asarray(inverse[None]))
    assert Stranger(affine).as_blocks(128, 32) is None
    assert Stranger(affine).as_blocks(128, 128) is not None


def test_a_stranger_whose_arrays_are_traced_is_told_which_method_to_write():
    def blocks(transform):
        return transform.as_blocks(WIDTH, 32)

    stranger = Stranger(single(_rotation(2, 32)(np.random.default_rng(0))))
    with pytest.raises(ValueError, match=r"Stranger has traced arrays.*give it a method as_blocks"):
        jax.jit(blocks)(stranger)
    assert jax.jit(lambda x: x + blocks(stranger).matrices)(1.0).shape == (2, 32, 32)
    assert jax.jit(blocks)(stranger.inner).matrices.shape == (2, 32, 32)


def test_the_identity_lowers_to_what_moves_nothing_at_all():
    x = jax.random.normal(jax.random.key(0), (5, WIDTH))
    np.testing.assert_array_equal(lower(Identity(), WIDTH, 32).activations(x), x)


def test_matrices_of_another_width_are_refused():
    with pytest.raises(ValueError, match="2 matrices of side 32 move a width of 64"):
        _rotation(2, 32)(np.random.default_rng(0)).activations(jnp.ones((3, 96)))


def test_small_blocks_are_blocks_of_a_larger_side_and_identities_move_no_channel():
    random = np.random.default_rng(0)
    each = np.asarray([np.linalg.qr(random.standard_normal((16, 16)))[0] for _ in range(4)])
    each = each.astype(np.float32)
    x = jnp.asarray(random.standard_normal((2, 64)), jnp.float32)
    for matrices in (each, each[:1]):
        small = BlockAffine(jnp.asarray(matrices), jnp.asarray(matrices.swapaxes(1, 2)))
        blocks = small.as_blocks(64, 32)
        assert blocks.matrices.shape == (max(1, len(matrices) // 2), 32, 32)
        larger = BlockAffine(blocks.matrices, blocks.inverses)
        for side in ("activations", "weights"):
            np.testing.assert_allclose(
                getattr(larger, side)(x), getattr(small, side)(x), rtol=1e-5, atol=1e-5
            )
        assert small.as_blocks(64, 24) is None
        assert small.as_channels(64) is None
    eye = jnp.eye(16)[None]
    assert BlockAffine(eye, eye).as_channels(64).in_place
