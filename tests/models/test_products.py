"""Where bfloat16 multiplies what is quantized as float32 does."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from duquantpp_jax.core import Exact
from duquantpp_jax.formats import E2M3, E3M2, E4M3, E5M2, MXFP4, MXFP8, NVFP4, Log256
from duquantpp_jax.formats.plain import BFloat16
from duquantpp_jax.models.products import LINEAR, is_one, matmul, narrow, of_one, split_product

FORMATS = [MXFP4(), MXFP8(), NVFP4()]


@pytest.mark.parametrize(
    ("element", "first"), [(MXFP4().element, 0), (E2M3, 0), (E3M2, 0), (E4M3, 3), (E5M2, 10)]
)
def test_bfloat16_holds_every_element_under_every_scale(element, first):
    finite = np.arange(element.max_code + 1, dtype=np.uint8)
    values = np.asarray(element.decode(finite), np.float64)
    for byte in range(255):
        wanted = values * 2.0 ** (byte - 127)
        wanted = wanted[wanted < 2.0**128]
        exact = np.array_equal(wanted.astype(ml_dtypes.bfloat16).astype(np.float64), wanted)
        assert exact == (byte >= first), byte


def test_bfloat16_holds_every_element_under_every_scale_of_nvfp4():
    codes = np.arange(128, dtype=np.uint8)
    values, scales = (
        np.asarray(e.decode(codes[: e.max_code + 1]), np.float64) for e in (MXFP4().element, E4M3)
    )
    products = np.multiply.outer(values, scales)
    np.testing.assert_array_equal(products.astype(ml_dtypes.bfloat16).astype(np.float64), products)


@functools.cache
def sides(format):
    """Inputs [8, 64] and weights [48, 64], of one magnitude so that their sums are short."""
    draw = np.random.default_rng(1)
    numbers = [draw.uniform(1, 2, n) * draw.choice([-1, 1], n) for n in ((8, 64), (48, 64))]
    return [format.quantize(side.astype(np.float32)) for side in numbers]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_products_in_bfloat16_are_exact_where_their_sums_are_short(format):
    x, w = (side.exactly() for side in sides(format))
    found = narrow(LINEAR, x.numbers, w.numbers)
    wanted = np.asarray(x.numbers, np.float64) @ np.asarray(w.numbers, np.float64).T
    np.testing.assert_array_equal(found, wanted)  # which float32 would round if they were long
    whole = [np.asarray(side.dequantize(), np.float64) for side in sides(format)]
    np.testing.assert_allclose(matmul(x, w), whole[0] @ whole[1].T, rtol=1e-5, atol=1e-6)


def test_long_sums_are_within_the_stated_error_of_the_float32_product():
    draw = np.random.default_rng(2)
    wide = [np.exp(3 * draw.standard_normal(shape)) for shape in ((8, 64), (48, 64))]
    x, w = (MXFP8().quantize(side.astype(np.float32)).exactly() for side in wide)
    found, same = narrow(LINEAR, x.numbers, w.numbers), matmul(x.whole(), w.whole())
    bound = 2.0**-23 * 64 * np.abs(np.asarray(x.numbers)) @ np.abs(np.asarray(w.numbers)).T
    assert np.all(np.abs(np.asarray(found) - np.asarray(same)) <= bound)


def test_a_float32_is_three_bfloat16_numbers_and_its_product_with_one_is_that_of_float32():
    draw = np.random.default_rng(3)
    x = jnp.asarray(np.exp(3 * draw.standard_normal((8, 64))), jnp.float32)
    one = jnp.eye(64, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(split_product(x, one), x)
    w = jnp.asarray(draw.standard_normal((48, 64)), jnp.bfloat16)
    wanted = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    bound = 2.0**-23 * 64 * np.abs(x) @ np.abs(np.asarray(w, np.float64)).T
    assert np.all(np.abs(np.asarray(split_product(x, w)) - wanted) <= bound)
    stored, wide = matmul(x, w), matmul(x, w.astype(jnp.float32))
    np.testing.assert_array_equal(stored, wide)


def test_one_token_alone_has_the_product_that_it_has_among_others():
    x, w = (side.exactly().numbers for side in sides(MXFP4()))
    assert not is_one(x)
    assert is_one(x[:1])
    assert is_one(x[0])
    among = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T  # exact: the sums are short
    for alone in (x[:1], x[None, :1], x[0]):
        found = of_one(alone, w.astype(jnp.bfloat16))
        assert found.shape == (*alone.shape[:-1], 48)
        np.testing.assert_array_equal(found.reshape(-1), among[0])


def test_scales_of_24_bits_are_multiplied_in_float32():
    x = np.linspace(-3, 3, 128, dtype=np.float32).reshape(2, 64)
    for found in (Log256().quantize(x).exactly(), Log256().exactly(jnp.asarray(x))):
        assert not isinstance(found, Exact)
        np.testing.assert_array_equal(found, Log256().fake_quantize(x))


@pytest.mark.parametrize("format", [MXFP4(), NVFP4(), BFloat16()], ids=str)
def test_an_exact_input_is_what_fake_quantize_gives_and_passes_gradients(format):
    x = jnp.asarray(np.linspace(-3, 3, 128, dtype=np.float32).reshape(2, 64))
    np.testing.assert_array_equal(format.exactly(x).whole(), format.fake_quantize(x))
    w = MXFP4().exactly(jnp.asarray(np.eye(48, 64, dtype=np.float32)))
    gradient = jax.grad(lambda x: jnp.sum(matmul(format.exactly(x), w)))(x)
    np.testing.assert_allclose(gradient, np.repeat([[1.0] * 48 + [0.0] * 16], 2, axis=0), rtol=1e-6)
