"""Rounding that gradients pass through: the bits of fake_quantize, the slopes of its docstring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.formats import MXFP4
from duquantpp_jax.learning.straight_through import learnable_quantize


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (6, 64))


@pytest.mark.parametrize("rule", [ScaleRule.FLOOR, ScaleRule.EVEN])
def test_forward_is_fake_quantize(x, rule):
    format = MXFP4(scale_rule=rule)
    offset = jnp.array([0.6, -1.4])
    quantized = learnable_quantize(format, True, x, offset)
    np.testing.assert_array_equal(
        quantized, format.fake_quantize(x, scale_offset=jnp.array([1, -1], jnp.int32))
    )


def test_slopes_are_those_of_the_docstring(x):
    format = MXFP4()
    g = jax.random.normal(jax.random.key(1), x.shape)
    log_scale = jnp.zeros(2)

    def value(x, log_scale, through):
        return jnp.sum(g * learnable_quantize(format, through, x, log_scale))

    q = np.asarray(format.fake_quantize(x), np.float64)
    limit = np.asarray(format.encode(x).limit())
    inside = np.abs(np.asarray(x)) <= limit
    assert inside.any()
    assert not inside.all()
    to_x, to_scale = jax.grad(value, argnums=(0, 1))(x, log_scale, False)
    np.testing.assert_array_equal(to_x, np.where(inside, g, 0))
    along = (np.where(inside, q - np.asarray(x), q) * np.asarray(g)).reshape(6, 2, 32).sum(-1)
    np.testing.assert_allclose(to_scale, np.log(2) * along.sum(0), rtol=1e-5)

    through = np.asarray(jax.grad(value)(x, log_scale, True)) - np.asarray(to_x)
    blocks = np.asarray(x).reshape(6, 2, 32)
    amax = np.abs(blocks).max(-1)
    expected = np.zeros_like(blocks)
    at = np.abs(blocks).argmax(-1)[..., None]
    sign = np.sign(np.take_along_axis(blocks, at, -1))
    np.put_along_axis(expected, at, sign * (along / amax)[..., None], -1)
    np.testing.assert_allclose(through.reshape(6, 2, 32), expected, atol=1e-5)


def test_a_clip_is_that_of_the_format_and_gets_the_slope_of_its_scales(x):
    format = MXFP4()
    g = jax.random.normal(jax.random.key(1), x.shape)
    log_clip = jnp.log(jnp.array([0.6, 0.9]))
    quantized = learnable_quantize(format, False, x, None, log_clip)
    np.testing.assert_array_equal(quantized, format.fake_quantize(x, clip=jnp.exp(log_clip)))

    def slope(log_clip):
        value = lambda c: jnp.sum(g * learnable_quantize(format, False, x, None, c))  # noqa: E731
        return jax.grad(value)(log_clip)

    def along(clip):
        q = format.encode(x, clip=clip)
        x64, y = (np.asarray(a, np.float64) for a in (x, q.dequantize()))
        inside = np.abs(x64) <= np.asarray(q.limit())
        return (np.where(inside, y - x64, y) * np.asarray(g)).reshape(6, 2, 32).sum((0, 2))

    np.testing.assert_allclose(slope(log_clip), along(jnp.exp(log_clip)), rtol=1e-5)
    single = jnp.log(jnp.array([0.6]))
    np.testing.assert_allclose(slope(single), [along(jnp.exp(single)).sum()], rtol=1e-5)
