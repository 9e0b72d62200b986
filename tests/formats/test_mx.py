"""The MX formats: whole blocks against exact arithmetic, and their edges."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

from duquantpp_jax.core import ElementRounding, MXArray, ScaleRule
from duquantpp_jax.formats import E2M1, E2M3, E3M2, E4M3, E5M2, MX, MXFP4, MXFP6, MXFP8

ALL_RULES = tuple(ScaleRule)
RULES = pytest.mark.parametrize("rule", ALL_RULES, ids=lambda r: r.value)
FORMATS = (MXFP4, *[functools.partial(MXFP6, e) for e in (E2M3, E3M2)],
           *[functools.partial(MXFP8, e) for e in (E4M3, E5M2)])  # fmt: skip


def grid(rules):
    """Every format under every rule; the quick tests have MXFP4 under all and FLOOR for all."""
    return pytest.mark.parametrize(
        ("make", "rule"),
        [
            pytest.param(
                make,
                rule,
                id=f"{make().element}-{rule.value}",
                marks=() if make is MXFP4 or rule is ScaleRule.FLOOR else pytest.mark.slow,
            )
            for make in FORMATS
            for rule in rules
        ],
    )


GRID, EXACT = grid(ALL_RULES), grid(oracle.AMAX_RULES)
DTYPES = pytest.mark.parametrize(
    "dtype",
    [
        np.float32,
        pytest.param(ml_dtypes.bfloat16, marks=pytest.mark.slow),
        pytest.param(np.float16, marks=pytest.mark.slow),
    ],
)
EVERY_FORMAT = pytest.mark.parametrize("make", FORMATS, ids=lambda f: repr(f().element))
TOP = float(np.finfo(np.float32).max)
COUNT = 96
"""Blocks of most arrays here and in the files beside: of one shape, for which a format's programs
are compiled once. Of so many does the exact arithmetic take the first few."""
FEW = 40


def blocks_of(count=COUNT, size=32, seed=0, dtype=np.float32) -> np.ndarray:
    """Blocks of all sizes that the type has, of heavy tails, with zeros, -0 and subnormals."""
    rng = np.random.default_rng(seed)
    low, high = (-26, 10) if dtype == np.float16 else (-150, 124)
    with np.errstate(over="ignore", under="ignore"):
        x = rng.standard_t(3, (count, size)) * 2.0 ** rng.integers(low, high, (count, 1))
        x = np.where(rng.random((count, size)) < 0.05, np.copysign(0.0, x), x).astype(dtype)
    return np.where(np.isfinite(x), x, dtype(1))


def both(q: MXArray) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(q.codes()), np.asarray(q.scale_bytes())


def assert_same(a: MXArray, b: MXArray) -> None:
    for mine, other in zip(both(a), both(b), strict=True):
        np.testing.assert_array_equal(mine, other)


@EXACT
@DTYPES
def test_codes_and_bytes_are_those_of_exact_arithmetic(make, rule, dtype):
    format, x = make(scale_rule=rule), blocks_of(dtype=dtype)
    codes, bytes_ = both(format.quantize(jnp.asarray(x)))
    for block, mine, byte in zip(x[:FEW], codes[:FEW], bytes_[:FEW, 0], strict=True):
        exact_byte, exact_codes = oracle.quantize_block(block, rule, format.element.name)
        assert byte == exact_byte
        np.testing.assert_array_equal(mine, exact_codes)


@pytest.mark.parametrize("rounding", oracle.DETERMINISTIC, ids=lambda r: r.value)
@pytest.mark.parametrize("make", [MXFP4, MXFP8])
def test_element_rounding_is_the_one_asked_for(make, rounding):
    format, x = make(rounding=rounding), blocks_of()
    x[:, 1::2] = np.round(x[:, 1::2] / x[:, :1].max() * 8) * x[:, :1].max() / 8  # some ties
    codes, _ = both(format.quantize(x))
    expected = [
        oracle.quantize_block(b, ScaleRule.FLOOR, format.element.name, rounding)[1] for b in x[:12]
    ]
    np.testing.assert_array_equal(codes[:12], expected)


@GRID
def test_dequantized_is_element_times_scale_exactly(make, rule):
    format, x = make(scale_rule=rule), blocks_of()
    q = format.quantize(x)
    codes, bytes_ = both(q)
    values = [[float(oracle.value(int(c), format.element.name)) for c in row] for row in codes]
    with np.errstate(over="ignore"):
        exact = np.ldexp(np.array(values), bytes_.astype(int) - 127).astype(np.float32)
    got = np.asarray(q.dequantize())
    np.testing.assert_array_equal(
        got.view(np.uint32) & 0x7FFFFFFF, exact.view(np.uint32) & 0x7FFFFFFF
    )
    np.testing.assert_array_equal(np.signbit(got), codes >> (format.element.bits - 1) == 1)


# Edges


@GRID
def test_nan_or_inf_anywhere_makes_its_whole_block_nan_and_no_other(make, rule):
    x = np.ones((COUNT, 32), np.float32)
    x[1::6, 17], x[3::6, 0], x[5::6, 31] = np.nan, np.inf, -np.inf
    q = make(scale_rule=rule).quantize(x)
    codes, bytes_ = both(q)
    assert (bytes_[1::2] == 255).all()
    assert not (codes[1::2] << (9 - q.element.bits) & 0xFF).any()  # nothing but signs
    rounded = np.asarray(q.dequantize())
    assert np.isnan(rounded[1::2]).all()
    np.testing.assert_array_equal(rounded[::2], x[::2])


@GRID
def test_zero_block_has_byte_zero_and_keeps_the_signs_of_its_zeros(make, rule):
    x = np.zeros((COUNT, 32), np.float32)
    x[:, ::3] = -0.0
    q = make(scale_rule=rule).quantize(x)
    codes, bytes_ = both(q)
    assert not bytes_.any()
    np.testing.assert_array_equal(codes, np.where(np.signbit(x), 1 << (q.element.bits - 1), 0))
    rounded = np.asarray(q.dequantize())
    assert not rounded.any()
    np.testing.assert_array_equal(np.signbit(rounded), np.signbit(x))


def test_negative_numbers_that_underflow_become_minus_zero():
    x = np.full((1, 32), -1e-6, np.float32)
    x[0, 0] = 4
    assert (both(MXFP4().quantize(x))[0][0, 1:] == 8).all()


@pytest.mark.parametrize("make", [MXFP4, pytest.param(MXFP8, marks=pytest.mark.slow)])
def test_largest_float32_saturates_under_floor_and_is_inf_under_the_rules_that_round_up(make):
    x = np.full((COUNT, 32), -TOP, np.float32)
    top = make().element
    floor = np.asarray(make().fake_quantize(x))
    assert (floor == -top.max * 2.0 ** (127 - top.emax)).all()
    for rule in (ScaleRule.CEIL, ScaleRule.EVEN, ScaleRule.RCEIL):
        assert np.isneginf(make(scale_rule=rule).fake_quantize(x)).all()


@GRID
def test_smallest_scale_holds_subnormals_exactly(make, rule):
    format = make(scale_rule=rule)
    step = float(oracle.magnitudes(format.element.name)[1])  # smallest element, a power of two
    x = np.float32(step) * np.float32(2.0**-120) * np.arange(32, dtype=np.float32)
    x = x.astype(np.float64) * 2.0**-7 * (np.arange(32) < 4)  # 0 to 3 steps of 2^-127
    x = np.tile(x, (COUNT, 1))
    if step * 2.0**-127 < 2.0**-149:
        pytest.skip("the step is below the smallest float32")
    q = format.quantize(x.astype(np.float32))
    assert not both(q)[1].any()
    np.testing.assert_array_equal(both(q)[0][:, :4], COUNT * [[0, 1, 2, 3]])
    np.testing.assert_array_equal(np.asarray(q.dequantize()), x.astype(np.float32))


def test_numbers_below_half_the_smallest_step_are_zero():
    x = np.full((1, 32), 2.0**-130, np.float32)
    q = MXFP4().quantize(x)
    assert both(q)[1][0] == 0
    assert not both(q)[0].any()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((2, 32)), "cannot quantize float64.*float32, bfloat16, float16.*rounds once more"),
        (np.ones((2, 32), np.int32), "cannot quantize int32"),
        (np.ones((2, 32), np.int8), "cannot quantize int8"),
        (np.ones((2, 32), bool), "cannot quantize bool"),
        (np.ones((2, 32), np.complex64), "cannot quantize complex64"),
        (np.ones((2, 32), ml_dtypes.float8_e8m0fnu), "cannot quantize float8_e8m0fnu"),
        (
            np.ones((2, 40), np.float32),
            "width of 40 is not a multiple of block 32: pad to 64 or choose",
        ),
        (np.float32(1)[None][0:1].reshape(()), "a single number"),
    ],
)
def test_what_cannot_be_quantized_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        MXFP4().quantize(x)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0,), (2, 0, 32)])
def test_empty_arrays_stay_empty(shape):
    q = MXFP4(scale_rule=ScaleRule.MSE).quantize(jnp.zeros(shape, jnp.float32))
    assert q.shape == shape
    assert q.scale_bytes().shape == (*shape[:-1], shape[-1] // 32)
    assert q.dequantize().shape == shape


def test_options_without_use_are_refused():
    x = jnp.ones((1, 32), jnp.float32)
    with pytest.raises(ValueError, match="tensor_scale is for formats with two levels"):
        MXFP4().quantize(x, tensor_scale=jnp.float32(1))
    with pytest.raises(ValueError, match=r"key is for stochastic rounding.*nearest_even"):
        MXFP4().quantize(x, key=jax.random.key(0))
    with pytest.raises(ValueError, match="needs a key"):
        MXFP4(rounding=ElementRounding.STOCHASTIC).quantize(x)
    with pytest.raises(ValueError, match="MXFP6 has e2m3 or e3m2 elements, not e2m1"):
        MXFP6(E2M1)
    with pytest.raises(ValueError, match="MXFP8 has e4m3 or e5m2 elements, not e3m2"):
        MXFP8(E3M2)
    with pytest.raises(ValueError, match="block of 0 elements"):
        MXFP4(block_size=0)


def test_scale_offset_moves_the_exponent_and_stops_at_both_ends():
    x = jnp.full((3, 32), 4.0, jnp.float32)
    q = MXFP4().quantize(x, scale_offset=jnp.asarray([[1], [-200], [200]], jnp.int32))
    assert q.scale_bytes().ravel().tolist() == [128, 0, 254]
    assert q.codes()[:, 0].tolist() == [4, 7, 0]  # 2, saturated, underflow


def test_clip_shrinks_amax_before_the_rule_and_what_is_beyond_saturates():
    x = np.full((2, 32), 1.0, np.float32)
    x[:, 0] = 8
    q = MXFP4().quantize(x, clip=jnp.asarray([[1.0], [0.25]], jnp.float32))
    assert q.scale_bytes().ravel().tolist() == [128, 126]
    assert np.asarray(q.dequantize())[:, 0].tolist() == [8, 3]
    for bad in (jnp.nan, jnp.inf):
        q = MXFP4().quantize(x, clip=jnp.float32(bad))
        assert (np.asarray(q.scale_bytes()) == 255).all()


@RULES
def test_clip_of_one_and_offset_of_zero_change_nothing(rule):
    x, format = blocks_of(), MXFP4(scale_rule=rule)
    assert_same(
        format.quantize(x), format.quantize(x, clip=jnp.ones(1), scale_offset=jnp.zeros(1, int))
    )


def test_formats_are_hashable_values():
    assert MXFP4() == MXFP4(scale_rule=ScaleRule.FLOOR)
    assert len({MXFP4(), MXFP4(), MXFP4(block_size=16), MX(E2M1)}) == 3
    assert MXFP8().element == E4M3
    assert MXFP6().element == E2M3


def test_numpy_and_jax_inputs_agree():
    x = blocks_of()
    assert_same(MXFP4().quantize(x), MXFP4().quantize(jnp.asarray(x)))


@pytest.mark.parametrize("block_size", [1, 2, 8, 16, 32, 64, 96])
def test_block_size_is_a_field(block_size):
    x = blocks_of(6, 192)
    q = MXFP4(block_size=block_size).quantize(x)
    codes, bytes_ = both(q)
    exact = [oracle.quantize_block(b, ScaleRule.FLOOR, "e2m1") for b in x.reshape(-1, block_size)]
    np.testing.assert_array_equal(bytes_.ravel(), [b for b, _ in exact])
    np.testing.assert_array_equal(codes.reshape(-1, block_size), [c for _, c in exact])


def test_float32_scales_have_no_bytes():
    from duquantpp_jax.formats import FP32Scale

    with pytest.raises(ValueError, match="scales of type float32 have no byte"):
        FP32Scale().quantize(jnp.ones((1, 32))).scale_bytes()


@pytest.mark.parametrize(
    ("clip", "byte"), [(2.0, 128), (4.0, 129), (8.0, 129)], ids=["clip 2", "clip 4", "clip 8"]
)
def test_of_scales_that_hold_a_block_exactly_mse_takes_the_largest(clip, byte):
    """4 and 1 are exact under 2^0 and 2^1, 4 and 2 under 2^2 too: whichever is tried first."""
    x = np.zeros((1, 32), np.float32)
    x[0, :2] = (4, 1) if clip == 2 else (4, 2)
    format = MXFP4(scale_rule=ScaleRule.MSE)
    q = format.quantize(x, clip=jnp.full((1, 1), clip, jnp.float32))
    np.testing.assert_array_equal(q.dequantize(), x)
    assert q.scale_bytes().item() == byte
