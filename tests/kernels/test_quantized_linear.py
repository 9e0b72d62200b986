"""quantized_linear: both kernels in a row, its derivative, and what maps over it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax import MXFP4, ScaleRule
from duquantpp_jax.kernels import Operand, quantized_linear
from duquantpp_jax.kernels.rotate_quantize import mosaic as rotate_quantize
from duquantpp_jax.kernels.scaled_matmul import mosaic as scaled_matmul
from duquantpp_jax.transforms.basic import Identity, Smooth
from duquantpp_jax.transforms.block import BlockRotation
from tests.kernels import interpreter
from tests.transforms.test_law import Stranger


@pytest.fixture(scope="module")
def layer():
    """x [3, 5, 96], w [40, 96], a transform, and the weights that belong to it."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (3, 5, 96))
    w = jax.random.normal(keys[1], (40, 96))
    rotations = jnp.linalg.qr(jax.random.normal(keys[2], (3, 32, 32)))[0]
    smooth = jnp.exp2(jax.random.normal(keys[3], (96,)))
    transform = Smooth(smooth).then(BlockRotation(rotations))
    return x, w, transform, Operand.from_mx(MXFP4().quantize(transform.weights(w)))


def by_hand(x, weights, transform, rule=ScaleRule.FLOOR):
    moved = MXFP4(scale_rule=rule).fake_quantize(transform.activations(x))
    return moved @ weights.dequantize().T


@pytest.mark.parametrize("rule", [ScaleRule.FLOOR, ScaleRule.EVEN, ScaleRule.MSE])
def test_it_is_the_product_of_both_sides_quantized(layer, rule):
    x, _, transform, weights = layer
    out = jax.jit(lambda x: quantized_linear(x, weights, transform, scale_rule=rule))(x)
    np.testing.assert_allclose(out, by_hand(x, weights, transform, rule), rtol=1e-4, atol=1e-4)


REVERSED = BlockRotation(jnp.eye(32)[None, ::-1])


@pytest.mark.parametrize("shared", [Identity(), REVERSED, Stranger(REVERSED)], ids=type)
def test_one_matrix_serves_all_blocks_and_a_transform_from_outside_is_seen_to_have_some(
    layer, shared
):
    x, w, _, _ = layer
    weights = Operand.from_mx(MXFP4().quantize(shared.weights(w)))
    out = jax.jit(lambda x: quantized_linear(x, weights, shared))(x)
    np.testing.assert_allclose(out, by_hand(x, weights, shared), rtol=1e-4, atol=1e-4)


def test_the_derivative_is_that_of_the_linear_without_rounding_of_x(layer):
    x, _, transform, weights = layer
    toward = jax.random.normal(jax.random.key(9), (3, 5, 40))
    w = weights.dequantize()

    def quantized(x, transform):
        return jnp.sum(toward * quantized_linear(x, weights, transform))

    def straight(x, transform):
        return jnp.sum(toward * (transform.activations(x) @ w.T))

    mine = jax.jit(jax.grad(quantized, argnums=(0, 1)))(x, transform)
    law = jax.grad(straight, argnums=(0, 1))(x, transform)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(law), strict=True):
        assert float(jnp.abs(a).max()) > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_vmap_over_tokens_is_one_larger_matmul(layer):
    x, _, transform, weights = layer

    def linear(x):
        return quantized_linear(x, weights, transform)

    np.testing.assert_array_equal(jax.vmap(linear)(x), linear(x))
    products = str(jax.make_jaxpr(jax.vmap(linear))(x)).count("dot_general")
    assert products == str(jax.make_jaxpr(linear)(x)).count("dot_general")


def test_vmap_over_weights_and_gradients(layer):
    x, _, transform, weights = layer
    both = jax.tree.map(lambda a: jnp.stack([a, jnp.flip(a, 0)]), weights)
    out = jax.vmap(lambda w: quantized_linear(x, w, transform))(both)
    np.testing.assert_array_equal(out[0], quantized_linear(x, weights, transform))
    assert not np.array_equal(out[0], out[1])

    def loss(x):
        return jnp.sum(quantized_linear(x, weights, transform) ** 2)

    np.testing.assert_allclose(jax.vmap(jax.grad(loss))(x), jax.grad(loss)(x), rtol=1e-4, atol=1e-3)


def test_out_dtype_follows_x_unless_given(layer):
    x, _, transform, weights = layer
    x = x.astype(jnp.bfloat16)
    assert quantized_linear(x, weights, transform).dtype == jnp.bfloat16
    assert quantized_linear(x, weights, transform, out_dtype=jnp.float32).dtype == jnp.float32


def test_transforms_that_mix_blocks_are_refused(layer):
    x, w, _, _ = layer
    wide = BlockRotation(jnp.eye(96)[None])
    weights = Operand.from_mx(MXFP4().quantize(w))
    with pytest.raises(ValueError, match="does not keep to blocks of 32"):
        quantized_linear(x, weights, wide)
    with pytest.raises(ValueError, match="x has 64 columns and weights 96"):
        quantized_linear(x[..., :64], weights, Identity())
    with pytest.raises(RuntimeError, match="this is cpu"):
        quantized_linear(x, weights, Identity(), implementation="mosaic_sm100")


@pytest.mark.slow
@interpreter.needs_interpreter
def test_the_two_kernels_fit_each_other(layer):
    """rotate_quantize's tiles are what scaled_matmul reads, edges of both included."""
    x, _, transform, weights = layer
    smooth, rotation = transform.links
    tokens = x.reshape(15, 96).astype(jnp.bfloat16)
    parameters = interpreter.parameters()
    with interpreter.block_scaling():
        moved = rotate_quantize.rotate_quantize(
            tokens, rotation.matrices, smooth.scale, interpret=parameters
        )
        out = scaled_matmul.scaled_matmul(
            moved, weights, out_dtype=jnp.float32, interpret=parameters
        )
    expected = moved.dequantize() @ weights.dequantize().T
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    law = np.asarray(by_hand(tokens.astype(jnp.float32), weights, transform))
    assert np.linalg.norm(out - law) <= 0.01 * np.linalg.norm(law)  # codes next to ties
