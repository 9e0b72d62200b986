"""Parametrisations: the law wherever the parameters are, the start where they are zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.core import Chain
from duquantpp_jax.transforms.basic import Permute, Smooth
from duquantpp_jax.transforms.block import BlockAffine, BlockRotation
from duquantpp_jax.transforms.hadamard import hadamard
from duquantpp_jax.transforms.learned import (
    PARAMETRIZATIONS,
    block_affine,
    check_condition,
    inverse,
    settled,
)


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


@pytest.mark.parametrize("name", ["affine", "affine_expm", "affine_lu"])
def test_a_bound_on_the_condition_draws_back_what_is_beyond_and_nothing_else(name):
    parametrization, bound = PARAMETRIZATIONS[name], 3.0
    far = {
        key: a.at[0].multiply(0.01).at[1:].multiply(4.0)
        for key, a in _moved(parametrization, 0.1).items()
    }

    def condition(parameters):
        return np.linalg.cond(
            np.asarray(parametrization.transform(_start(), parameters).matrices, np.float64)
        )

    before = condition(far)
    assert before[0] < bound
    assert np.all(before[1:] > bound)
    near = parametrization.bounded(_start(), far, bound)
    assert np.all(condition(near) <= bound * (1 + 2e-5))
    for key, a in near.items():
        np.testing.assert_array_equal(a[0], far[key][0])
    less = {key: a / 0.9 for key, a in near.items()}
    assert np.all(condition(less)[1:] > bound)


def test_a_start_beyond_the_bound_is_refused():
    stretched = BlockAffine(_start().matrices.at[1, 0].multiply(7.0), _start().inverses)
    check_condition(_start(), 1.0)
    check_condition(stretched, 7.0)
    with pytest.raises(ValueError, match=r"max_condition = 6, .* condition number 7"):
        check_condition(stretched, 6.0)


def test_what_is_settled_is_exact_to_float32():
    off = 1e-5 * jax.random.normal(jax.random.key(2), (3, 8, 8))
    drifted = BlockAffine(_start().matrices + off, _start().inverses)
    rotation = settled(drifted, PARAMETRIZATIONS["cayley"])
    r = np.asarray(rotation.matrices, np.float64)
    assert np.abs(r @ np.swapaxes(r, 1, 2) - np.eye(8)).max() < 2e-7
    np.testing.assert_array_equal(rotation.inverses, jnp.swapaxes(rotation.matrices, 1, 2))
    affine = settled(drifted, PARAMETRIZATIONS["affine"])
    np.testing.assert_array_equal(affine.matrices, drifted.matrices)
    product = np.asarray(affine.matrices, np.float64) @ np.asarray(affine.inverses, np.float64)
    assert np.abs(product - np.eye(8)).max() < 2e-7


def test_a_rotation_of_scaled_channels_is_settled_as_scales_that_fold_and_a_rotation():
    parametrization = PARAMETRIZATIONS["smooth_rotation"]
    learned = parametrization.transform(_start(), _moved(parametrization, 0.1))
    found = settled(learned, parametrization)
    smooth, rotation = found.links
    assert smooth.cost(24).fuses
    assert float(np.abs(np.log(smooth.scale)).max()) > 0.05
    r = np.asarray(rotation.matrices, np.float64)
    assert np.abs(r @ r.mT - np.eye(8)).max() < 2e-7
    x = jnp.eye(24)
    np.testing.assert_allclose(found.activations(x), learned.activations(x), atol=1e-6)
    # Layers are stacked: where nothing was learned the form is the same.
    assert len(settled(_start(), parametrization).links) == 2


def test_inverses_and_their_derivative_are_those_of_lapack():
    m = jax.random.normal(jax.random.key(3), (5, 8, 8)).at[0, 0, 0].set(0.0)  # wants a pivot
    g = jax.random.normal(jax.random.key(4), m.shape)
    wanted = np.linalg.inv(np.asarray(m, np.float64))
    found, back = jax.vjp(inverse, m)
    bound = (
        8 * 2.0**-24 * np.linalg.cond(m)[:, None, None] * np.abs(wanted).max((1, 2), keepdims=True)
    )
    assert np.all(np.abs(found - wanted) <= bound)
    t = np.swapaxes(wanted, 1, 2)
    np.testing.assert_allclose(back(g)[0], -t @ np.asarray(g, np.float64) @ t, rtol=1e-3, atol=1e-4)


def test_smoothing_becomes_part_of_the_matrices():
    scale = jnp.linspace(0.5, 2.0, 24)
    transform = Chain((Smooth(scale), BlockRotation(hadamard(8)[None])))
    x = jax.random.normal(jax.random.key(1), (5, 24))
    affine = block_affine(transform, 24, 8)
    np.testing.assert_allclose(affine.activations(x), transform.activations(x), atol=1e-6)
    np.testing.assert_allclose(affine.weights(x), transform.weights(x), atol=1e-6)


def test_a_permutation_is_no_start():
    with pytest.raises(ValueError, match="not made of matrices of side 8"):
        block_affine(Permute(jnp.arange(24)[::-1]), 24, 8)
