"""Every scale rule at every border of every exponent, against fractions."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from duquantpp_jax.core import ElementRounding, ScaleRule
from duquantpp_jax.formats import scales as sc
from duquantpp_jax.formats.division import divide_by, magnitude_bits, quotient, split
from duquantpp_jax.formats.errors import squared_error

least_error_exponent = jax.jit(sc.least_error_exponent, static_argnums=(2, 3))


def exponents(amax: np.ndarray, rule: ScaleRule, element) -> np.ndarray:
    bits = jnp.asarray(amax.view(np.uint32))
    return np.asarray(sc.clamp(sc.scale_exponent(bits, rule, element)))


@pytest.mark.parametrize("element", oracle.ELEMENTS, ids=repr)
@pytest.mark.parametrize("rule", oracle.AMAX_RULES, ids=lambda r: r.value)
def test_exponent_is_that_of_exact_arithmetic(rule, element):
    amax = oracle.telling_magnitudes(element.name)
    expected = [oracle.scale_exponent(Fraction(float(a)), rule, element.name) for a in amax]
    np.testing.assert_array_equal(exponents(amax, rule, element), expected)


@pytest.mark.parametrize("element", oracle.ELEMENTS, ids=repr)
def test_float_rceil_is_the_float32_product_and_its_ceiling(element):
    amax = oracle.telling_magnitudes(element.name)
    product = amax * np.float32(1 / element.max)  # NumPy keeps subnormals
    mantissa, exponent = np.frexp(product)
    ceiling = np.where(mantissa == 0.5, exponent - 1, exponent)
    ceiling = np.where(product == 0, -127, ceiling)
    got = exponents(amax, ScaleRule.RCEIL_FLOAT, element)
    np.testing.assert_array_equal(got, np.clip(ceiling, -127, 127))


def test_float_rceil_differs_from_the_exact_one_at_one_magnitude():
    amax = oracle.telling_magnitudes("e2m1")
    exact = exponents(amax, ScaleRule.RCEIL, oracle.E2M1)
    differs = exact != exponents(amax, ScaleRule.RCEIL_FLOAT, oracle.E2M1)
    assert amax[differs].tolist() == [6 * 2.0**-127 + 2.0**-148]


@pytest.mark.parametrize(
    ("amax", "floor", "ceil", "even", "rceil"),
    [
        (7.0, 0, 1, 1, 1),
        (6.5, 0, 1, 0, 1),
        (6.0, 0, 1, 0, 0),
        (5.0, 0, 1, 0, 0),
        (4.0, 0, 0, 0, 0),
        (float(np.nextafter(np.float32(16), np.float32(0))), 1, 2, 2, 2),
        (2.0**-149, -127, -127, -127, -127),
        (float(np.finfo(np.float32).max), 125, 126, 126, 126),
    ],
)
def test_rules_differ_where_it_is_known_that_they_do(amax, floor, ceil, even, rceil):
    got = [exponents(np.float32([amax]), r, oracle.E2M1)[0] for r in oracle.AMAX_RULES]
    assert got == [floor, ceil, even, rceil]


@pytest.mark.parametrize("rule", [*oracle.AMAX_RULES, ScaleRule.RCEIL_FLOAT, ScaleRule.MSE])
def test_zero_has_the_smallest_scale(rule):
    assert exponents(np.float32([0.0]), rule, oracle.E2M1)[0] == -127


def test_amax_sees_every_position_and_puts_nan_above_all():
    size = 8192  # so many that a float maximum loses NaN on CPUs
    blocks = np.tile(np.float32(1), (4, size))
    blocks[0, -1], blocks[1, 0], blocks[2, 5], blocks[3, 7] = -3, np.nan, -np.inf, 2
    bits = np.asarray(sc.block_amax(jnp.asarray(blocks)))
    assert bits[0] == np.float32(3).view(np.uint32)
    assert (bits[1:3] >= sc.INFINITY_BITS).all()
    assert bits[1] > sc.INFINITY_BITS == bits[2]
    assert bits[3] == np.float32(2).view(np.uint32)


def random_blocks(count=300, size=32, seed=0) -> np.ndarray:
    """Blocks of many shapes and sizes, some of them subnormal."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, (count, size)) * 2.0 ** rng.integers(-140, 100, (count, 1))
    return x.astype(np.float32)


@pytest.mark.parametrize("name", ["e2m1", "e4m3"])
def test_mse_has_the_least_error_of_its_three(name):
    element = next(e for e in oracle.ELEMENTS if e.name == name)
    blocks = random_blocks(150)
    amax = sc.block_amax(jnp.asarray(blocks))
    floor = sc.scale_exponent(amax, ScaleRule.FLOOR, element)
    chosen = least_error_exponent(jnp.asarray(blocks), floor, element, ElementRounding.NEAREST_EVEN)
    for block, base, exponent in zip(blocks, np.asarray(floor), np.asarray(chosen), strict=True):
        candidates = {int(np.clip(np.clip(base, -127, 127) + d, -127, 127)) for d in (-1, 0, 1)}
        errors = {c: oracle.block_error(block, c, name) for c in candidates}
        assert int(exponent) in candidates
        # Squares are rounded to float32 before they are added: 2^-23 is what that may change.
        assert errors[int(exponent)] <= min(errors.values()) * (1 + Fraction(1, 2**22))


def test_mse_takes_the_larger_scale_of_equals():
    # Under the scales 1 and 2 all numbers of the first block are elements; of the others, under 1.
    blocks = jnp.asarray([[4.0, 2.0, 0.0, -4.0], [4.0, 0.5, 0.0, 0.0], [3.0, 1.0, 2.0, -2.0]])
    floor = sc.scale_exponent(sc.block_amax(blocks), ScaleRule.FLOOR, oracle.E2M1)
    chosen = least_error_exponent(blocks, floor, oracle.E2M1, ElementRounding.NEAREST_EVEN)
    assert chosen.tolist() == [1, 0, 0]


@pytest.mark.parametrize("size", [1, 5, 128])
def test_mse_works_for_every_block_size(size):
    blocks = random_blocks(60, size, seed=size)
    floor = sc.scale_exponent(sc.block_amax(jnp.asarray(blocks)), ScaleRule.FLOOR, oracle.E2M1)
    chosen = np.asarray(
        least_error_exponent(jnp.asarray(blocks), floor, oracle.E2M1, ElementRounding.NEAREST_EVEN)
    )
    for block, base, exponent in zip(blocks, np.asarray(sc.clamp(floor)), chosen, strict=True):
        errors = [oracle.block_error(block, int(max(base + d, -127)), "e2m1") for d in (-1, 0, 1)]
        mine = oracle.block_error(block, int(exponent), "e2m1")
        assert mine <= min(errors) * (1 + Fraction(1, 2**22))


@pytest.mark.parametrize("size", [1, 3, 16, 32, 100])
def test_squared_errors_are_exact_sums_of_rounded_squares(size):
    rng = np.random.default_rng(size)
    x = (rng.uniform(0, 1, (20, size)) * 2.0 ** -rng.integers(0, 20, (20, 1))).astype(np.float32)
    bits = 30 - (size - 1).bit_length()
    high, low = squared_error(jnp.asarray(x), jnp.zeros(x.shape, jnp.float32))
    for row, most, least in zip(x, np.asarray(high), np.asarray(low), strict=True):
        squares = [Fraction(float(v * v)) for v in row]
        cut = sum(math.floor(v * 4**bits) for v in squares)
        assert int(most) * 2**bits + int(least) == cut
        assert 0 <= least < 2**bits


def test_quotients_are_exact_to_their_sticky_bit():
    rng = np.random.default_rng(5)
    bits = rng.integers(1, 0x7F800000, (2, 4000), np.uint32)
    a, b = oracle.float32(bits)
    a[:100] = b[:100] * np.float32(1.5)
    b = np.where(np.isfinite(a), b, np.float32(1))
    a = np.where(np.isfinite(a), a, np.float32(1))
    q, exponent = quotient(jnp.asarray(-a), jnp.asarray(b))
    for x, y, mine, e in zip(a, b, np.asarray(q), np.asarray(exponent), strict=True):
        true = Fraction(float(x)) / Fraction(float(y)) / oracle.power(int(e))
        assert mine < 0
        whole = int(-mine)
        assert 2**14 < whole < 2**16
        if whole % 2:
            assert whole - 1 < true < whole + 1
        else:
            assert true == whole


@pytest.mark.parametrize("divisor", [3, 6, 7, 15, 21])
def test_dividing_by_a_constant_is_rounded_once(divisor):
    x = oracle.telling_magnitudes("e2m1")
    x = x[x > 2.0**-100]
    q, exponent = divide_by(magnitude_bits(jnp.asarray(x)), divisor)
    got = np.ldexp(np.asarray(q, np.float64), np.asarray(exponent))
    np.testing.assert_array_equal(got, (x / np.float32(divisor)).astype(np.float64))


def test_split_gives_back_every_magnitude():
    x = np.concatenate([oracle.telling_magnitudes("e2m1"), np.float32([0.0])])
    exponent, significand = split(jnp.asarray(x.view(np.uint32)))
    back = np.ldexp(np.asarray(significand, np.float64), np.asarray(exponent) - 23)
    np.testing.assert_array_equal(back, x.astype(np.float64))
    assert ((np.asarray(significand) >> 23 == 1) | (x == 0)).all()
