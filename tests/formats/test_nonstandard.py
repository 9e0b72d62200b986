"""The scales that are not MXFP4's, against their formulas in exact or float64 arithmetic."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from duquantpp_jax.core import ElementRounding
from duquantpp_jax.formats import NVFP4, FP32Scale, FPQuant, Log256, Quest
from tests.formats.test_mx import COUNT, FEW

FORMATS = (FP32Scale(), Log256(), FPQuant(), Quest())
ALL = pytest.mark.parametrize("format", FORMATS, ids=lambda f: type(f).__name__)


def blocks_of(count=COUNT, seed=0, spread=6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, (count, 32)) * 2.0 ** rng.integers(-spread, spread, (count, 1))
    return x.astype(np.float32)


@ALL
@pytest.mark.parametrize("rounding", oracle.DETERMINISTIC, ids=lambda r: r.value)
def test_elements_are_the_exact_quotients_rounded_once(format, rounding):
    format, x = type(format)(rounding=rounding), blocks_of()
    q = format.quantize(x)
    quantized = np.asarray(q.codes())[:FEW], np.asarray(q.scales)[:FEW, 0]
    for block, codes, scale in zip(x[:FEW], *quantized, strict=True):
        exact = [oracle.code(v, Fraction(float(scale)), "e2m1", rounding) for v in block]
        np.testing.assert_array_equal(codes, exact)


def test_fp32_scale_is_a_sixth_of_amax_rounded_once():
    x = blocks_of(400, spread=60)
    sixth = np.abs(x).max(axis=-1) / np.float32(6)
    np.testing.assert_array_equal(FP32Scale().quantize(x).scales.ravel(), sixth)


def test_fpquant_scale_is_four_thirds_of_floors():
    x = blocks_of(200, spread=60)
    x[:4, 0] = 64 * np.abs(x[:4]).max()
    _, exponent = np.frexp(np.abs(x).max(axis=-1))
    expected = np.ldexp(np.float32(4 / 3), exponent - 1 - 2)
    q = FPQuant().quantize(x)
    np.testing.assert_array_equal(q.scales.ravel(), expected)
    ratio = np.abs(x).max(axis=-1) / expected
    assert ((ratio > 2.9999) & (ratio < 6)).all()


def test_quest_scale_is_the_power_of_two_below_its_multiple_of_the_deviation():
    x = blocks_of(400, spread=20)
    wide = x.astype(np.float64)
    gauge = 2.92247856 / 6 * wide.std(axis=-1) + 1e-8
    expected = 2.0 ** np.floor(np.log2(gauge))
    border = np.abs(np.log2(gauge) - np.round(np.log2(gauge))) < 1e-5
    scales = np.asarray(Quest().quantize(x).scales).ravel()
    np.testing.assert_array_equal(scales[~border], expected[~border])
    assert border.sum() < 5


def test_log256_scale_lies_on_its_grid_of_256_steps():
    x = blocks_of(300)
    r = np.abs(x).max(axis=-1).astype(np.float64) / 6
    log, scales = np.log2(r), np.asarray(Log256().quantize(x).scales).ravel()
    low, high = log.min(), log.max()
    position = 255 * (log - low) / (high - low)
    index = np.clip(np.floor(position), 0, 255)
    border = np.abs(position - np.round(position)) < 1e-3
    expected = 2 ** (low + (high - low) * index / 255)
    np.testing.assert_allclose(scales[~border], expected[~border], rtol=1e-5)
    assert border.sum() < 10
    np.testing.assert_allclose(scales[[r.argmin(), r.argmax()]], [r.min(), r.max()], rtol=1e-5)


def test_log256_depends_on_every_block_of_the_call():
    x = blocks_of()
    together = np.asarray(Log256().fake_quantize(x))
    x[-1] *= 2.0**12
    assert (together[:-1] != np.asarray(Log256().fake_quantize(x))[:-1]).any()


def test_log256_without_spread_has_the_scale_of_fp32():
    x = np.tile(blocks_of(1), (COUNT, 1))
    got, exact = Log256().quantize(x).scales, FP32Scale().quantize(x).scales
    np.testing.assert_allclose(got, exact, rtol=1e-6)


def test_log256_takes_no_notice_of_zero_blocks():
    x = blocks_of()
    x[-2:] = x[:2]
    without = np.asarray(Log256().fake_quantize(x))
    x[-2:] = 0
    np.testing.assert_array_equal(np.asarray(Log256().fake_quantize(x))[:-2], without[:-2])


@ALL
def test_nan_and_inf_make_their_block_nan_and_no_other(format):
    x = blocks_of()
    x[[1, 3]] = x[0]
    clean = np.asarray(format.fake_quantize(x))
    x[1, 5], x[3, 0] = np.nan, -np.inf
    q = format.quantize(x)
    rounded = np.asarray(q.dequantize())
    assert np.isnan(rounded[[1, 3]]).all()
    assert np.isnan(np.asarray(q.scales)[[1, 3]]).all()
    np.testing.assert_array_equal(np.delete(rounded, [1, 3], 0), np.delete(clean, [1, 3], 0))


@ALL
def test_zero_blocks_stay_zero_with_their_signs(format):
    x = np.zeros((COUNT, 32), np.float32)
    x[:, ::2] = -0.0
    rounded = np.asarray(format.fake_quantize(x))
    assert not rounded.any()
    np.testing.assert_array_equal(np.signbit(rounded), np.signbit(x))


@ALL
@pytest.mark.parametrize("power", [-149, -135, -126, 126])
def test_the_ends_of_float32_are_held_without_nan(format, power):
    x = np.ldexp(np.linspace(-1.9, 1.9, 32, dtype=np.float64), power).astype(np.float32)
    x = np.tile(x, (COUNT, 1))
    rounded = np.asarray(format.fake_quantize(x))
    assert np.isfinite(rounded).all()
    if isinstance(format, Quest) and power < 0:
        assert not rounded.any()  # its 1e-8 keeps the scale above 2^-27
        return
    # The smallest scale is 2^-126, and half of half of that rounds to zero.
    assert np.abs(rounded - x).max() <= max(np.abs(x).max() * 0.6, 2.0**-128)


@pytest.mark.parametrize("format", [*FORMATS, NVFP4()], ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_empty_arrays_stay_empty(format, shape):
    q = format.quantize(jnp.zeros(shape, jnp.float32))
    assert q.shape == shape
    assert q.dequantize().shape == shape


@ALL
def test_options_without_use_are_refused(format):
    x = jnp.ones((1, 32), jnp.float32)
    name = type(format).__name__
    with pytest.raises(ValueError, match=f"{name} has no use for scale_offset"):
        format.quantize(x, scale_offset=jnp.int32(1))
    with pytest.raises(ValueError, match=f"{name} has no use for tensor_scale"):
        format.quantize(x, tensor_scale=jnp.float32(1))
    with pytest.raises(ValueError, match="key is for stochastic rounding"):
        format.quantize(x, key=jax.random.key(0))
    with pytest.raises(ValueError, match="cannot quantize float64"):
        format.quantize(np.ones((1, 32)))


def test_clip_shrinks_the_scale():
    x = blocks_of()
    full, half = FP32Scale().quantize(x), FP32Scale().quantize(x, clip=jnp.float32(0.5))
    np.testing.assert_array_equal(half.scales, full.scales / 2)


def test_stochastic_rounding_of_quotients_is_unbiased():
    x = np.full((20000, 32), 0.37, np.float32)
    x[:, 0] = 6.0
    format = FP32Scale(rounding=ElementRounding.STOCHASTIC)
    rounded = np.asarray(format.fake_quantize(x, key=jax.random.key(0)))[:, 1:]
    assert set(np.unique(rounded)) == {0.0, 0.5}
    deviation = 0.5 * np.sqrt(0.74 * 0.26 / rounded.size)
    assert abs(rounded.mean() - 0.37) < 5 * deviation


@pytest.mark.slow
@pytest.mark.parametrize("format", [FP32Scale(), FPQuant()], ids=lambda f: type(f).__name__)
def test_jit_eager_and_vmap_agree_bit_for_bit(format):
    x = jnp.asarray(blocks_of()).reshape(-1, 64)
    q = format.quantize(x)
    with jax.disable_jit():
        eager = format.quantize(x)
    for other in (eager, jax.jit(format.quantize)(x), jax.vmap(format.quantize)(x)):
        np.testing.assert_array_equal(other.codes(), q.codes())
        np.testing.assert_array_equal(other.scales, q.scales)
