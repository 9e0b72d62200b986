"""Parametrisations: the law wherever the parameters are, the start where they are zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.core import Chain
from duquantpp_jax.transforms.basic import Smooth
from duquantpp_jax.transforms.block import BlockAffine, BlockRotation
from duquantpp_jax.transforms.hadamard import hadamard
from duquantpp_jax.transforms.learned import PARAMETRIZATIONS, block_affine
from duquantpp_jax.transforms.permutation import Permute


def _start():
    matrices = jnp.tile(hadamard(8)[None], (3, 1, 1))
    return BlockAffine(matrices, jnp.swapaxes(matrices, 1, 2))


def _moved(parametrization, size):
    names = parametrization.init(_start())
    keys = jax.random.split(jax.random.key(0), len(names))
    return {
        name: size * jax.random.normal(key, zeros.shape)
        for key, (name, zeros) in zip(keys, names.items(), strict=True)
    }


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_inverse_is_kept_wherever_the_parameters_are(name):
    parametrization = PARAMETRIZATIONS[name]
    moved = parametrization.transform(_start(), _moved(parametrization, 0.05))
    product = np.asarray(moved.matrices, np.float64) @ np.asarray(moved.inverses, np.float64)
    assert np.abs(product - np.eye(8)).max() < 2e-6
    assert np.abs(np.asarray(moved.matrices - _start().matrices)).max() > 1e-2


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_zero_parameters_are_the_start(name):
    parametrization = PARAMETRIZATIONS[name]
    moved = parametrization.transform(_start(), parametrization.init(_start()))
    np.testing.assert_allclose(moved.matrices, _start().matrices, atol=3e-7)


@pytest.mark.parametrize("name", ["expm", "cayley"])
def test_rotations_stay_orthogonal(name):
    parametrization = PARAMETRIZATIONS[name]
    r = np.asarray(
        parametrization.transform(_start(), _moved(parametrization, 0.5)).matrices, np.float64
    )
    assert np.abs(r @ np.swapaxes(r, 1, 2) - np.eye(8)).max() < 3e-6


def test_smoothing_becomes_part_of_the_matrices():
    scale = jnp.linspace(0.5, 2.0, 24)
    transform = Chain((Smooth(scale), BlockRotation(hadamard(8)[None])))
    x = jax.random.normal(jax.random.key(1), (5, 24))
    one = block_affine(transform, 24, 8)
    np.testing.assert_allclose(one.activations(x), transform.activations(x), atol=1e-6)
    np.testing.assert_allclose(one.weights(x), transform.weights(x), atol=1e-6)


def test_a_permutation_is_no_start():
    with pytest.raises(ValueError, match="not made of matrices of side 8"):
        block_affine(Permute(jnp.arange(24)[::-1]), 24, 8)
