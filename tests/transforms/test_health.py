"""Health and costs are what a dense matrix says, and misuse is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from duquantpp_jax.core import Chain, Cost, Transform
from duquantpp_jax.recipes import FITS, recipe
from duquantpp_jax.transforms.basic import Identity, Permute, Smooth
from duquantpp_jax.transforms.block import BlockAffine, BlockRotation, KroneckerRotation
from duquantpp_jax.transforms.hadamard import hadamard, hadamard_factors
from experiments.health import health, matrices
from tests.conftest import stats_of


def test_the_condition_is_that_of_each_block_or_of_the_whole():
    scale = jnp.concatenate([jnp.linspace(1.0, 4.0, 32), jnp.linspace(10.0, 30.0, 32)])
    assert health(Smooth(scale), 64).condition == pytest.approx(30.0)
    assert health(Smooth(scale), 64, 32).condition == pytest.approx(4.0)


def test_errors_of_a_wrong_inverse_and_of_a_rotation_that_is_none_show():
    eye = jnp.eye(32)[None]
    wrong = BlockAffine(2 * eye, 0.5 * eye + 0.125)
    assert health(wrong, 32).law_error == pytest.approx(0.25)
    assert health(BlockRotation(1.5 * eye), 64).orthogonality_error == pytest.approx(1.25)


def test_what_is_not_finite_shows_as_nan():
    assert np.isnan(health(Smooth(jnp.ones(32).at[3].set(jnp.inf)), 32).condition)
    assert health(Smooth(jnp.ones(32).at[3].set(0.0)), 32) != health(Smooth(jnp.ones(32)), 32)


def test_matrices_are_those_of_the_transform():
    rng = np.random.default_rng(0)
    affine = jnp.asarray(rng.normal(size=(2, 4, 4)), jnp.float32)
    chain = Chain((Permute(jnp.asarray(rng.permutation(8))), BlockAffine(affine, affine)))
    t, back = matrices(chain, 8)
    eye = jnp.eye(8)
    np.testing.assert_allclose(t[0], chain.activations(eye), atol=1e-6)
    np.testing.assert_allclose(back[0], chain.weights(eye), atol=1e-6)
    blocks, _ = matrices(chain.links[1], 8, 4)
    np.testing.assert_allclose(blocks, affine, rtol=1e-6)


def test_blocks_that_mix_are_refused():
    with pytest.raises(ValueError, match="mixes channels beyond blocks of 32"):
        health(Permute(jnp.arange(64)[::-1]), 64, 32)


@pytest.mark.parametrize(
    ("transform", "cost"),
    [
        (Identity(), Cost(0, 0, fuses=True)),
        (Smooth(jnp.ones(64)), Cost(1, 256, fuses=True)),
        (Permute(jnp.arange(64)), Cost(0, 256, fuses=True)),
        (BlockRotation(hadamard(32)[None]), Cost(32, 4096)),
        (BlockAffine(jnp.ones((2, 32, 32)), jnp.ones((2, 32, 32))), Cost(32, 8192)),
        (KroneckerRotation(hadamard_factors(896)), Cost(28 + 32, 4 * (28**2 + 32**2))),
        (Chain((Smooth(jnp.ones(64)), Permute(jnp.arange(64)))), Cost(1, 512, fuses=True)),
        (Chain((Smooth(jnp.ones(64)), BlockRotation(hadamard(32)[None]))), Cost(33, 4352)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_costs_count_what_is_done_online(transform, cost):
    assert transform.cost(64) == cost


def test_a_transform_that_does_not_say_costs_a_whole_matrix():
    @struct.dataclass
    class Silent(Transform):
        def activations(self, x):
            return x

        def weights(self, w):
            return w

        def inverse(self):
            return self

    assert Silent().cost(64).multiply_adds == 64


def test_one_matrix_a_block_online_is_what_every_fit_of_that_kind_costs():
    x = jax.random.normal(jax.random.key(0), (1, 16, 64))
    weights, stats = (jnp.ones((3, 64)),), stats_of(x)
    for name in ("block_hadamard", "greedy", "haar", "dct", "pca_hadamard", "wush", "gsr"):
        fitted = FITS[name](weights, stats, recipe(name, "floor"), jax.random.key(1))
        assert fitted.transform.cost(64).multiply_adds == 32, name
