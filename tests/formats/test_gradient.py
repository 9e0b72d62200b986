"""fake_quantize lets gradients straight through, under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.core import ElementRounding
from duquantpp_jax.formats import MXFP4, NVFP4, FP32Scale
from duquantpp_jax.recipes import fake_quantize

FORMATS = pytest.mark.parametrize(
    "format", [MXFP4(), NVFP4(), FP32Scale()], ids=lambda f: type(f).__name__
)


def numbers(rows=4) -> jax.Array:
    x = np.random.default_rng(0).standard_normal((rows, 64)).astype(np.float32)
    x[:, 0] = 7.5  # beyond 6, the largest element under FLOOR's scale of 1
    x[:, 33] = -7.25
    return jnp.asarray(x)


SLOPE = jnp.linspace(-1, 2, 64)


@FORMATS
def test_value_is_that_of_quantize_then_dequantize(format):
    x = numbers()
    np.testing.assert_array_equal(format.fake_quantize(x), format.quantize(x).dequantize())


@FORMATS
def test_gradient_is_one_everywhere_by_default(format):
    gradient = jax.grad(lambda x: jnp.sum(SLOPE * format.fake_quantize(x)))(numbers())
    np.testing.assert_array_equal(gradient, jnp.broadcast_to(SLOPE, gradient.shape))


def test_gradient_is_zero_beyond_the_largest_element_if_asked():
    x = numbers()
    loss = lambda x: jnp.sum(SLOPE * MXFP4().fake_quantize(x, saturated_gradient=False))  # noqa: E731
    passes = np.abs(x) <= 6
    passes[:, 1:32] = True  # the scale is 1 in both blocks
    np.testing.assert_array_equal(jax.grad(loss)(x), np.where(passes, SLOPE, 0))
    assert (np.asarray(passes).sum(axis=-1) == 62).all()


def test_numbers_at_the_largest_element_pass():
    x = jnp.zeros((1, 32), jnp.float32).at[0, :3].set(jnp.asarray([6.0, 6.5, -6.0]))
    gradient = jax.grad(lambda x: MXFP4().fake_quantize(x, saturated_gradient=False).sum())(x)
    assert gradient[0, :4].tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradient_has_the_type_of_the_input(dtype):
    x = numbers().astype(dtype)
    slope = SLOPE.astype(dtype)
    gradient = jax.grad(lambda x: jnp.sum(slope * MXFP4().fake_quantize(x)))(x)
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, jnp.broadcast_to(slope, x.shape))


@pytest.mark.slow
@pytest.mark.parametrize("saturated", [True, False])
def test_jit_vmap_scan_remat_and_forward_mode_agree_with_eager(saturated):
    x = numbers()
    row = lambda x: jnp.sum(SLOPE * MXFP4().fake_quantize(x, saturated_gradient=saturated))  # noqa: E731
    rows = lambda x: jax.vmap(row)(x).sum()  # noqa: E731
    eager = jnp.stack([jax.grad(row)(block) for block in x])
    scanned = lambda x: jax.lax.scan(lambda total, b: (total + row(b), None), 0.0, x)[0]  # noqa: E731
    for gradient in (
        jax.grad(rows)(x),
        jax.jit(jax.grad(rows))(x),
        jax.vmap(jax.grad(row))(x),
        jax.grad(scanned)(x),
        jax.grad(jax.checkpoint(scanned))(x),
        jax.jacfwd(rows)(x),
    ):
        np.testing.assert_array_equal(gradient, eager)


def test_gradient_goes_to_x_and_not_to_options():
    x, clip = numbers(), jnp.float32(0.9)
    loss = lambda x, clip: jnp.sum(MXFP4().fake_quantize(x, clip=clip))  # noqa: E731
    to_x, to_clip = jax.grad(loss, argnums=(0, 1))(x, clip)
    np.testing.assert_array_equal(to_x, np.ones_like(x))
    assert to_clip == 0


def test_stochastic_rounding_passes_gradients_and_follows_its_key():
    x, format = numbers(), MXFP4(rounding=ElementRounding.STOCHASTIC)
    draw = lambda x, seed: format.fake_quantize(x, key=jax.random.key(seed))  # noqa: E731
    np.testing.assert_array_equal(draw(x, 0), draw(x, 0))
    assert (draw(x, 0) != draw(x, 1)).any()
    gradient = jax.jit(jax.grad(lambda x: draw(x, 0).sum()))(x)
    np.testing.assert_array_equal(gradient, np.ones_like(x))


def test_float64_is_refused_and_not_cast():
    for options in ({}, {"axis": 0, "pad": True}):
        with pytest.raises(ValueError, match="cannot quantize float64"):
            MXFP4().fake_quantize(np.ones((1, 32)), **options)
    with pytest.raises(ValueError, match=r"shape \(4, 64\) has no axis 2"):
        MXFP4().fake_quantize(numbers(), axis=2)


def test_blocks_lie_along_any_axis_and_zeros_fill_the_last():
    x, slope = np.asarray(numbers()), np.asarray(SLOPE)
    wanted = np.asarray(MXFP4().fake_quantize(x))
    np.testing.assert_array_equal(MXFP4().fake_quantize(x.T, axis=0), wanted.T)
    filled = x.copy()
    filled[:, 40:] = 0
    cut = MXFP4().fake_quantize(jnp.asarray(x[:, :40]), pad=True)
    np.testing.assert_array_equal(cut, np.asarray(MXFP4().fake_quantize(filled))[:, :40])
    loss = lambda x: jnp.sum(slope[:40, None] * MXFP4().fake_quantize(x, axis=0, pad=True))  # noqa: E731
    gradient = jax.grad(loss)(jnp.asarray(x[:, :40].T))
    np.testing.assert_array_equal(gradient, np.broadcast_to(slope[:40, None], (40, 4)))


def test_a_pytree_keeps_its_types_and_bfloat16_holds_the_numbers():
    x = numbers().astype(jnp.bfloat16)
    given = {"a": x, "b": [x.astype(jnp.float32), x.astype(jnp.float8_e5m2)]}
    found = fake_quantize(given, "mxfp4:floor")
    assert jax.tree.map(lambda a: a.dtype, found) == jax.tree.map(lambda a: a.dtype, given)
    np.testing.assert_array_equal(found["a"].astype(jnp.float32), found["b"][0])
    np.testing.assert_array_equal(found["b"][0], MXFP4().quantize(x).dequantize())


def test_the_gradient_of_quantize_then_dequantize_is_zero_as_is_said():
    gradient = jax.grad(lambda x: MXFP4().quantize(x).dequantize().sum())(numbers())
    np.testing.assert_array_equal(gradient, np.zeros((4, 64)))
