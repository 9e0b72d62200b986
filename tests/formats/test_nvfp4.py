"""NVFP4 against its definition in fractions, and the edges of its two levels of scale."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duquantpp_jax.core import ElementRounding, MXArray
from duquantpp_jax.formats import NVFP4
from tests.formats.test_mx import COUNT

E4M3_SIGN = 1 << 7


def blocks_of(count=COUNT, seed=0, spread=12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, (count, 16)) * 2.0 ** rng.integers(-spread, spread, (count, 1))
    x[3] = 0
    x[4, :8] = -0.0
    return x.astype(np.float32)


def tensor_scale(x: np.ndarray, four_over_six=False) -> np.float32:
    """max |x| / 2688 (or 1536), rounded to float32 once: NumPy divides as IEEE 754 says."""
    return np.float32(np.abs(x).max()) / np.float32(6 * (256 if four_over_six else 448))


def block_scale(share: Fraction, t: np.float32) -> int:
    if not share:
        return 0
    code = oracle.round_magnitude(share / Fraction(float(t)), "e4m3", ElementRounding.NEAREST_EVEN)
    return max(code, 1)


def elements(block: np.ndarray, byte: int, t: np.float32) -> list[int]:
    scale = oracle.magnitudes("e4m3")[max(byte, 1)]
    total = np.float32(float(scale)) * t  # rounded to float32
    return [oracle.code(v, Fraction(float(total)), "e2m1") for v in block]


def error(block, byte, t) -> Fraction:
    scale = oracle.magnitudes("e4m3")[byte] * Fraction(float(t))
    found = [oracle.value(c, "e2m1") * scale for c in elements(block, byte, t)]
    return sum((Fraction(float(v)) - h) ** 2 for v, h in zip(block, found, strict=True))


def check(q: MXArray, x: np.ndarray, t: np.float32) -> None:
    assert float(q.tensor_scale) == t
    codes, bytes_ = np.asarray(q.codes()).reshape(-1, 16), np.asarray(q.scale_bytes()).ravel()
    for block, mine, byte in zip(x.reshape(-1, 16), codes, bytes_, strict=True):
        sixth = np.float32(np.abs(block).max()) / np.float32(6)
        assert byte == block_scale(Fraction(float(sixth)), t)
        np.testing.assert_array_equal(mine, elements(block, int(byte), t))


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 6, 12]))
def test_scales_and_codes_are_those_of_the_definition(seed, spread):
    x = blocks_of(seed=seed, spread=spread)
    check(NVFP4().quantize(x.reshape(COUNT // 2, -1)), x, tensor_scale(x))


def test_given_tensor_scale_is_used_and_what_it_cannot_reach_saturates():
    x = blocks_of(spread=3)
    t = np.float32(0.0123)
    check(NVFP4().quantize(x, tensor_scale=jnp.float32(t)), x, t)
    small = np.float32(1e-5)
    q = NVFP4().quantize(x, tensor_scale=jnp.float32(small))
    largest = np.abs(x).max(axis=-1) > 448 * 6 * small
    assert (np.asarray(q.scale_bytes())[largest] == 0x7E).all()
    assert np.abs(q.dequantize()).max() <= 448 * 6 * small * (1 + 1e-6)


def test_four_over_six_takes_the_scale_of_least_error_and_six_of_equals():
    x = blocks_of(2 * COUNT, seed=1, spread=2)
    t = tensor_scale(x, four_over_six=True)
    q = NVFP4(four_over_six=True).quantize(x)
    assert float(q.tensor_scale) == t
    chosen = np.asarray(q.scale_bytes()).ravel()
    fours = 0
    for block, mine, byte in zip(x, np.asarray(q.codes()), chosen, strict=True):
        amax = np.float32(np.abs(block).max())
        six = block_scale(Fraction(float(amax / np.float32(6))), t)
        four = block_scale(Fraction(float(amax)) / 4, t)
        errors = error(block, six, t), error(block, four, t)
        if abs(errors[0] - errors[1]) > Fraction(1, 2**20) * errors[0] or six == four:
            assert byte == (four if errors[1] < errors[0] else six)
        assert byte in (six, four)
        fours += byte == four != six
        np.testing.assert_array_equal(mine, elements(block, int(byte), t))
    assert 20 < fours < 180  # both are chosen


def test_four_over_six_has_no_larger_error_than_six_under_the_same_tensor_scale():
    x = blocks_of(2 * COUNT, seed=2, spread=2)
    t = jnp.float32(tensor_scale(x, four_over_six=True))
    of = lambda f: np.square(np.float64(x) - f.fake_quantize(x, tensor_scale=t)).sum(-1)  # noqa: E731
    assert (of(NVFP4(four_over_six=True)) <= of(NVFP4()) * (1 + 1e-6)).all()


def test_dequantized_is_the_product_of_the_three_rounded_once():
    x = blocks_of(seed=3)
    q = NVFP4().quantize(x)
    t = Fraction(float(q.tensor_scale))
    found = np.asarray(q.dequantize())
    scale_bytes = q.scale_bytes().ravel()
    for mine, codes, byte in zip(found, np.asarray(q.codes()), scale_bytes, strict=True):
        scale = oracle.magnitudes("e4m3")[int(byte)] * t
        exact = [np.float32(float(oracle.value(int(c), "e2m1") * scale)) for c in codes]
        np.testing.assert_array_equal(mine, exact)


def test_nan_or_inf_makes_its_block_nan_and_leaves_the_tensor_scale_to_the_rest():
    x = blocks_of()
    x[1, 5], x[2, 0] = np.nan, -np.inf
    q = NVFP4().quantize(x)
    rest = x.copy()
    rest[[1, 2]] = 0
    assert float(q.tensor_scale) == tensor_scale(rest)
    found = np.asarray(q.dequantize())
    assert np.isnan(found[[1, 2]]).all()
    assert (np.asarray(q.scale_bytes()).ravel()[[1, 2]] == 0x7F).all()
    rounded = np.asarray(NVFP4().fake_quantize(rest))
    np.testing.assert_array_equal(np.delete(found, [1, 2], 0), np.delete(rounded, [1, 2], 0))


def test_zeros_stay_zeros_with_their_signs():
    for x in (np.zeros((COUNT, 16), np.float32), -np.zeros((COUNT, 16), np.float32)):
        q = NVFP4().quantize(x)
        assert float(q.tensor_scale) == 1
        assert not np.asarray(q.scale_bytes()).any()
        found = np.asarray(q.dequantize())
        np.testing.assert_array_equal(np.signbit(found), np.signbit(x))
        assert not found.any()


@pytest.mark.parametrize("power", [-145, -120, 100, 125])
def test_very_small_and_very_large_tensors_are_held(power):
    x = np.ldexp(blocks_of(spread=1).astype(np.float64), power)
    x = np.clip(x, -float(np.finfo(np.float32).max), float(np.finfo(np.float32).max))
    found = np.asarray(NVFP4().fake_quantize(x.astype(np.float32)), np.float64)
    assert np.isfinite(found).all()
    # Below 2^-126 / 2688 the tensor scale stops shrinking: steps are then 2^-136.
    step = max(np.abs(x).max() / 6, 2.0**-136)
    assert np.abs(found - x).max() <= step


def test_tensor_scale_is_positive_however_small_the_tensor():
    q = NVFP4().quantize(np.full((COUNT, 16), 2.0**-149, np.float32))
    assert float(q.tensor_scale) == 2.0**-126
    assert math.isfinite(float(q.dequantize()[0, 0]))


def test_options_without_use_are_refused():
    x = jnp.ones((1, 16), jnp.float32)
    with pytest.raises(ValueError, match="scale_offset is for scales that are powers of two"):
        NVFP4().quantize(x, scale_offset=jnp.int32(1))
    with pytest.raises(ValueError, match="width of 8 is not a multiple of block 16"):
        NVFP4().quantize(jnp.ones((1, 8), jnp.float32))
    with pytest.raises(ValueError, match="block of 0"):
        NVFP4(block_size=0)
    with pytest.raises(ValueError, match="needs a key"):
        NVFP4(rounding=ElementRounding.STOCHASTIC).quantize(x)


@pytest.mark.slow
@pytest.mark.parametrize("four_over_six", [False, True])
def test_jit_eager_and_vmap_agree_bit_for_bit(four_over_six):
    format = NVFP4(four_over_six=four_over_six)
    x = jnp.asarray(blocks_of(2 * COUNT).reshape(COUNT, 32))
    q = format.quantize(x)
    with jax.disable_jit():
        eager = format.quantize(x)
    t = q.tensor_scale
    mapped = jax.vmap(lambda row: format.quantize(row, tensor_scale=t))(x)
    for other in (eager, jax.jit(format.quantize)(x), mapped):
        np.testing.assert_array_equal(other.codes(), q.codes())
        np.testing.assert_array_equal(other.scale_bytes(), q.scale_bytes())
        np.testing.assert_array_equal(other.dequantize(), q.dequantize())


def test_a_scale_from_calibration_is_a_power_of_two_with_room_for_twice_the_largest():
    above = np.nextafter(np.float32(2688), np.float32(np.inf))
    amax = jnp.asarray([2688, above, 1344, 1e-38], jnp.float32)
    scales = np.asarray(NVFP4(calibrated=True).calibrated_scale(amax))
    assert scales.tolist() == [2, 4, 1, 2.0**-126]
    assert NVFP4().calibrated_scale(amax) is None


def test_rounding_what_is_rounded_changes_nothing_but_where_a_scale_is_subnormal():
    for seed in range(4):
        once = NVFP4().quantize(blocks_of(seed=seed, spread=2)).dequantize()
        np.testing.assert_array_equal(NVFP4().fake_quantize(once), once)
    x = blocks_of(spread=1)
    x[:] = 0
    x[0, 0], x[1, 0] = 2688, 9 * 2.0**-9  # t = 1, and 1.5 times the least scale: 4 of 2 of them
    once = NVFP4().fake_quantize(x)
    assert (once[1, 0], NVFP4().fake_quantize(once)[1, 0]) == (8 * 2.0**-9, 6 * 2.0**-9)


def test_clip_shrinks_the_amax_of_blocks_and_not_the_tensor_scale():
    x = blocks_of(spread=1)
    q, half = NVFP4().quantize(x), NVFP4().quantize(x, clip=jnp.float32(0.5))
    assert float(q.tensor_scale) == float(half.tensor_scale)
    limit, half_limit = np.asarray(q.limit())[0, 0], np.asarray(half.limit())[0, 0]
    assert half_limit == limit / 2


def test_a_block_that_six_and_four_hold_alike_takes_six():
    """The largest number of a tensor is exact as 6 * 256 and as 4 * 384."""
    x = np.zeros((1, 16), np.float32)
    x[0, 3] = 1536
    q = NVFP4(four_over_six=True).quantize(x)
    np.testing.assert_array_equal(q.dequantize(), x)
    assert float(q.scales[0, 0]) == 256
