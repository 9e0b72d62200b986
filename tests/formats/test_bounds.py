"""What an element can lose, as a share of the largest magnitude of its block: a bound for each
format and rule that has one, kept by random blocks; those of the MX formats are reached, too.

MSE bounds the squared error of a block, not an element's (test_mx.py).
"""

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duquantpp_jax.core import ScaleRule
from duquantpp_jax.formats import NVFP4, FP32Scale, FPQuant, Log256
from tests.formats.test_mx import COUNT, EVERY_FORMAT, FORMATS

seeds = st.integers(0, 2**32 - 1)
BOUNDED = (*oracle.AMAX_RULES, ScaleRule.RCEIL_FLOAT)


def error_bound(rule: ScaleRule, element) -> float:
    """Largest error over amax: of rounding at 1 + half a quantum, or of what saturates."""
    rounding = 1 / (2 ** (element.mantissa_bits + 1) + 1)
    largest = {  # of amax over the scale, where that is above element.max
        ScaleRule.FLOOR: 1.0,
        ScaleRule.EVEN: 1 - 2.0 ** -(element.mantissa_bits + 2),
    }.get(rule, 0.0)
    saturated = 1 - element.max / (largest * 2.0 ** (element.emax + 1)) if largest else 0.0
    return max(rounding, saturated)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from(BOUNDED), st.sampled_from(FORMATS))
def test_error_is_within_the_bound_of_the_rule(seed, rule, make):
    x = np.random.default_rng(seed).standard_t(3, (COUNT, 32)).astype(np.float32)
    format = make(scale_rule=rule)
    error = np.abs(np.asarray(format.fake_quantize(x), np.float64) - x)
    bound = error_bound(rule, format.element) * (1 + (rule is ScaleRule.RCEIL_FLOAT) * 2.0**-22)
    assert (error <= bound * np.abs(x).max(axis=-1, keepdims=True).astype(np.float64)).all()


@EVERY_FORMAT
@pytest.mark.parametrize("rule", oracle.AMAX_RULES, ids=lambda r: r.value)
def test_the_bound_of_the_rule_is_reached(make, rule):
    format = make(scale_rule=rule, block_size=1)
    x = np.linspace(1, 4, 4096, endpoint=False, dtype=np.float32)[:, None]
    error = np.abs(np.asarray(format.fake_quantize(x), np.float64) - x) / x
    assert error.max() >= 0.99 * error_bound(rule, format.element)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_error_is_at_most_a_fifth_of_the_largest_of_the_block(seed):
    # 2.5 becomes 2 or 3. A block's scale, rounded to E4M3, cuts off at most 1 of 17 where normal.
    x = np.random.default_rng(seed).standard_t(3, (COUNT, 16)).astype(np.float32)
    error = np.abs(np.asarray(NVFP4().fake_quantize(x), np.float64) - x)
    bound = (1 + 2.0**-22) / 5 * np.abs(x).max(axis=-1, keepdims=True).astype(np.float64)
    assert (error <= bound).all()


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from((FP32Scale(), FPQuant())))
def test_scales_without_saturation_lose_at_most_a_fifth_of_the_largest(seed, format):
    # amax / scale lies in [3, 6] (fp32: 6), where 2.5 becomes 2 and 5 becomes 4.
    x = np.random.default_rng(seed).standard_t(3, (COUNT, 32)).astype(np.float32)
    error = np.abs(np.asarray(format.fake_quantize(x), np.float64) - x)
    bound = (1 + 2.0**-22) / 5 * np.abs(x).max(axis=-1, keepdims=True).astype(np.float64)
    assert (error <= bound).all()


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_log256_loses_no_more_than_rounding_or_one_step_of_its_grid(seed):
    x = np.random.default_rng(seed).standard_t(3, (COUNT, 32)).astype(np.float32)
    amax = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64)
    step = 1 - (amax.min() / amax.max()) ** (1 / 255)
    error = np.abs(np.asarray(Log256().fake_quantize(x), np.float64) - x)
    assert (error <= max(1 / 5, step) * (1 + 2.0**-20) * amax).all()
