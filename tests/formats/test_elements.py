"""Elements are rounded as exact arithmetic rounds, for every bf16 and fp16 number there is."""

import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duquantpp_jax.core.arrays import times_power_of_two
from duquantpp_jax.core.choices import ElementRounding
from duquantpp_jax.formats import elements
from duquantpp_jax.formats.mx import to_float32

encode = jax.jit(elements.encode, static_argnums=(2, 3))
ELEMENTS = pytest.mark.parametrize("element", oracle.ELEMENTS, ids=repr)


def every(dtype) -> np.ndarray:
    """Every finite number of a 16-bit type."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    exponent = 0x7F80 if dtype == ml_dtypes.bfloat16 else 0x7C00
    return bits[bits & exponent != exponent].view(dtype)


@ELEMENTS
def test_codes_stand_for_the_values_of_ml_dtypes(element):
    codes = np.arange(1 << element.bits, dtype=np.uint8)
    theirs = codes.view(oracle.DTYPES[element.name]).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(element.decode(jnp.asarray(codes))), theirs)
    assert np.array_equal(np.signbit(element.decode(jnp.asarray(codes))), np.signbit(theirs))


@ELEMENTS
def test_storing_codes_loses_nothing(element):
    codes = jnp.arange(1 << element.bits, dtype=jnp.uint8)
    stored = element.store(codes)
    assert stored.dtype == element.dtype
    np.testing.assert_array_equal(element.codes(stored), codes)


@ELEMENTS
def test_constants_follow_from_the_bits(element):
    assert element.max == oracle.MAXIMA[element.name]
    assert element.emax == math.floor(math.log2(element.max))
    assert element.bits == ml_dtypes.finfo(oracle.DTYPES[element.name]).bits


@ELEMENTS
@pytest.mark.parametrize(
    "rounding",
    [pytest.param(r, id=r.value, marks=pytest.mark.slow if r.value == "away" else ())
     for r in oracle.DETERMINISTIC],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "fp16"])
def test_every_16_bit_number_is_rounded_exactly(element, rounding, dtype):
    numbers = every(dtype)
    encoded = jax.jit(lambda x, e: elements.encode(to_float32(x), e, element, rounding))
    for exponent in (0, -3, 5, -127, 127):
        codes = encoded(jnp.asarray(numbers), jnp.int32(exponent))
        exact = np.ldexp(numbers.astype(np.float64), -exponent)
        np.testing.assert_array_equal(codes, oracle.codes_float64(exact, element.name, rounding))


@ELEMENTS
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "fp16"])
def test_nearest_even_is_the_cast_of_ml_dtypes_within_range(element, dtype):
    numbers = every(dtype)
    numbers = numbers[np.abs(numbers.astype(np.float64)) <= element.max]
    codes = encode(to_float32(jnp.asarray(numbers)), jnp.int32(0), element)
    theirs = numbers.astype(oracle.DTYPES[element.name]).view(np.uint8)
    np.testing.assert_array_equal(codes, theirs)


@ELEMENTS
@pytest.mark.parametrize("rounding", oracle.DETERMINISTIC, ids=lambda r: r.value)
def test_ties_and_their_neighbours_are_rounded_as_fractions_are(element, rounding):
    table = oracle.magnitudes(element.name)
    borders = [float((a + b) / 2) for a, b in itertools.pairwise(table)]
    x = np.array([*borders, *map(float, table)], np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(np.inf))])
    x = np.concatenate([x, -x])
    codes = encode(jnp.asarray(x), jnp.int32(0), element, rounding)
    expected = [oracle.code(v, Fraction(1), element.name, rounding) for v in x]
    np.testing.assert_array_equal(codes, expected)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=64, max_size=64),
    st.integers(-127, 127),
    st.sampled_from(oracle.ELEMENTS),
    st.sampled_from(oracle.DETERMINISTIC),
)
def test_any_float32_is_rounded_exactly(bits, exponent, element, rounding):
    x = oracle.float32(bits)
    x = np.where(np.isfinite(x), x, np.float32(0))
    codes = encode(jnp.asarray(x), jnp.int32(exponent), element, rounding)
    exact = np.ldexp(x.astype(np.float64), -exponent)
    np.testing.assert_array_equal(codes, oracle.codes_float64(exact, element.name, rounding))


@ELEMENTS
def test_every_code_under_every_scale_byte_is_decoded_exactly(element):
    codes = np.arange(element.max_code + 1)
    codes = np.concatenate([codes, codes + sign(element)])
    exponents = np.arange(-127, 128)[:, None]
    values = [float(oracle.value(int(c), element.name)) for c in codes]
    with np.errstate(over="ignore"):
        exact = np.ldexp(np.array(values), exponents).astype(np.float32)
    exact = np.where(codes >= sign(element), -np.abs(exact), exact)  # fractions have no -0
    decoded = element.decode(
        jnp.broadcast_to(jnp.asarray(codes, jnp.uint8), exact.shape), jnp.asarray(exponents)
    )
    np.testing.assert_array_equal(
        np.abs(np.asarray(decoded)).view(np.uint32), np.abs(exact).view(np.uint32)
    )
    np.testing.assert_array_equal(
        np.signbit(decoded), np.broadcast_to(codes >= sign(element), exact.shape)
    )


def sign(element) -> int:
    return 1 << (element.bits - 1)


def test_powers_of_two_multiply_subnormal_results_exactly():
    x = jnp.asarray([1.0, -1.5, 0.0, -0.0, jnp.inf, 6.0], jnp.float32)
    for exponent in (-149, -130, -127, 0, 126, 127, 128):
        with np.errstate(over="ignore", under="ignore"):
            exact = np.ldexp(np.asarray(x, np.float64), exponent)
        got = np.asarray(times_power_of_two(x, jnp.int32(exponent))).astype(np.float64)
        cut = np.trunc(exact * 2.0**149) / 2.0**149
        np.testing.assert_array_equal(
            got, np.where(np.abs(cut) >= 2.0**128, np.copysign(np.inf, cut), cut)
        )
        np.testing.assert_array_equal(np.signbit(got), np.signbit(exact))


@ELEMENTS
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "fp16"])
def test_every_16_bit_number_is_rounded_stochastically_to_a_neighbour(element, dtype):
    numbers = every(dtype)
    draw = lambda x: elements.encode(  # noqa: E731
        to_float32(x), jnp.int32(0), element, ElementRounding.STOCHASTIC, jax.random.key(5)
    )
    up = np.asarray(jax.jit(draw)(jnp.asarray(numbers))).astype(int)
    up -= oracle.codes_float64(numbers, element.name, ElementRounding.TOWARD_ZERO)
    values = np.array([float(v) for v in oracle.magnitudes(element.name)])
    exact = np.isin(np.abs(numbers.astype(np.float64)), values)
    saturated = np.abs(numbers.astype(np.float64)) >= element.max
    assert np.isin(up, [0, 1]).all()
    assert not up[exact | saturated].any()


@ELEMENTS
def test_stochastic_rounding_goes_to_a_neighbour_and_leaves_elements_alone(element):
    x = np.random.default_rng(0).uniform(-element.max, element.max, 4096).astype(np.float32)
    x = np.concatenate([x, x * np.float32(2.0**-12), [0.0, -0.0]]).astype(np.float32)
    codes = np.asarray(
        encode(jnp.asarray(x), jnp.int32(0), element, ElementRounding.STOCHASTIC, jax.random.key(1))
    )
    down = oracle.codes_float64(x, element.name, ElementRounding.TOWARD_ZERO)
    table = np.array([float(v) for v in oracle.magnitudes(element.name)])
    exact = table[down & ~np.uint8(sign(element))] == np.abs(x)
    assert np.isin(codes - down, [0, 1]).all()
    assert (codes[exact] == down[exact]).all()
    assert 0 < (codes != down).mean() < 1


@ELEMENTS
def test_stochastic_rounding_is_unbiased(element):
    # Around each x the mean of n draws has the deviation sqrt(p (1 - p) / n) quanta; 5 of them
    # are exceeded with probability 6e-7 by an unbiased rounding. 40 numbers are tried.
    n, few = 1 << 16, 40
    table = np.array([float(v) for v in oracle.magnitudes(element.name)])
    x = np.random.default_rng(2).uniform(0, table[-1], few).astype(np.float32)
    x[:10] *= np.float32(2.0**-6)
    x[:4] = table[1] * np.array([2.0**-4, 2.0**-7, 0.5, 0.999], np.float32)
    draws = encode(
        jnp.broadcast_to(jnp.asarray(x), (n, few)),
        jnp.int32(0),
        element,
        ElementRounding.STOCHASTIC,
        jax.random.key(3),
    )
    below = oracle.codes_float64(x, element.name, ElementRounding.TOWARD_ZERO)
    p = (x - table[below]) / (table[below + 1] - table[below])
    share = (np.asarray(draws) == below + 1).mean(axis=0)
    np.testing.assert_array_less(np.abs(share - p), 5 * np.sqrt(p * (1 - p) / n) + 1e-9)


def test_stochastic_rounding_of_numbers_far_below_a_quantum_is_rare_but_happens():
    x = jnp.full(1 << 20, 0.5 * 2.0**-16, jnp.float32)  # 16 draws in 2^20 are expected to round up
    codes = encode(x, jnp.int32(0), oracle.E2M1, ElementRounding.STOCHASTIC, jax.random.key(4))
    assert 4 <= int(codes.sum()) <= 36
    tiny = jnp.full(1 << 20, 2.0**-120, jnp.float32)
    codes = encode(tiny, jnp.int32(0), oracle.E2M1, ElementRounding.STOCHASTIC, jax.random.key(4))
    assert int(codes.sum()) == 0


def test_stochastic_rounding_needs_a_key():
    with pytest.raises(ValueError, match=r"key=jax.random.key\(seed\)"):
        encode(jnp.ones(2), jnp.int32(0), oracle.E2M1, ElementRounding.STOCHASTIC)
