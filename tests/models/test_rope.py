"""Rescaled rotary frequencies against the definitions, a pair at a time in scalar arithmetic."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from duquantpp_jax.models.rope import LinearScaling, Llama3, Yarn, rotary_frequencies

YARNS = st.builds(
    Yarn,
    factor=st.floats(0.25, 64),
    original_max_position_embeddings=st.integers(8, 10**6),
    beta_fast=st.floats(4, 64),
    beta_slow=st.floats(0.25, 3),
    truncate=st.booleans(),
)
LLAMAS = st.builds(
    Llama3,
    factor=st.floats(0.25, 64),
    original_max_position_embeddings=st.integers(8, 10**6),
    low_freq_factor=st.floats(0.25, 2),
    high_freq_factor=st.floats(3, 16),
)
THETAS, PAIRS = st.sampled_from([10.0, 100.0, 1e4, 1e6]), st.integers(2, 64)
FEW = settings(max_examples=100, deadline=None)


def llama3(scaling: Llama3, turns: float) -> float:
    """The share of w_i that is kept, by the three cases."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if turns > high:
        return 1.0
    return 0.0 if turns < low else (turns - low) / (high - low)


def yarn(scaling: Yarn, theta: float, pairs: int, i: int) -> float:
    """The share of w_i that is kept: transformers bounds the ramp by 0 and head_dim - 1."""

    def crossing(times):
        length = scaling.original_max_position_embeddings
        return 2 * pairs * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = crossing(scaling.beta_fast), crossing(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low = 0 if low < 0 else low
    high = 2 * pairs - 1 if high > 2 * pairs - 1 else high
    if abs(high - low) < 1e-3 or high < low:
        return 1.0 - (i > low)  # a step; its own pair is left out by the test
    return 1 - min(1.0, max(0.0, (i - low) / (high - low)))


def expected(scaling, theta: float, pairs: int) -> list[float]:
    found = []
    for i in range(pairs):
        w = theta ** (-i / pairs)
        if isinstance(scaling, Yarn):
            kept = yarn(scaling, theta, pairs, i)
        else:
            kept = llama3(scaling, scaling.original_max_position_embeddings * w / (2 * math.pi))
        found.append((1 - kept) * w / scaling.factor + kept * w)
    return found


@given(YARNS | LLAMAS, THETAS, PAIRS)
@example(Yarn(8.0, 1008, truncate=False), 10.0, 8)  # the ramp would end beyond 2 pairs - 1
@example(Yarn(8.0, 1008), 10.0, 8)
@example(Yarn(8.0, 10**6), 10.0, 8)  # all of it would lie beyond the last pair
@example(Yarn(8.0, 16, beta_fast=32.0), 1e4, 8)  # the ramp would begin before pair 0
@example(Llama3(8.0, 1.0, 4.0, 64), 1e4, 32)
@FEW
def test_every_pair_is_divided_by_its_share(scaling, theta, pairs):
    found = rotary_frequencies(theta, 2 * pairs, scaling)
    np.testing.assert_allclose(found, expected(scaling, theta, pairs), rtol=1e-5)


@given(YARNS | LLAMAS, THETAS, PAIRS)
@FEW
def test_a_frequency_lies_between_itself_and_itself_divided(scaling, theta, pairs):
    plain = rotary_frequencies(theta, 2 * pairs, None)
    divided = rotary_frequencies(theta, 2 * pairs, LinearScaling(scaling.factor))
    np.testing.assert_allclose(divided, plain / scaling.factor, rtol=1e-6)
    found = rotary_frequencies(theta, 2 * pairs, scaling)
    assert (found <= np.maximum(plain, divided) * (1 + 1e-6)).all()
    assert (found >= np.minimum(plain, divided) * (1 - 1e-6)).all()


@given(YARNS, THETAS, PAIRS)
@FEW
def test_the_ramp_of_yarn_never_rises(scaling, theta, pairs):
    plain = rotary_frequencies(theta, 2 * pairs, None)
    ratio = np.asarray(rotary_frequencies(theta, 2 * pairs, scaling), np.float64) / plain
    towards = 1 if scaling.factor < 1 else -1
    assert (np.diff(ratio) * towards >= -1e-6).all()


@pytest.mark.parametrize(
    ("factor", "wanted"), [(0.25, 1.0), (1.0, 1.0), (4.0, 1.1386294), (40.0, 1.3688879)]
)
def test_the_magnitude_of_yarn_is_one_until_the_context_grows(factor, wanted):
    """.1 ln 4 + 1 and .1 ln 40 + 1, in decimals."""
    assert Yarn(factor, 64).magnitude() == pytest.approx(wanted, abs=1e-7)
    for share in (0.0, 0.7):
        assert Yarn(factor, 64, attention_factor=share).magnitude() == share


def test_only_yarn_has_a_magnitude():
    assert LinearScaling(4.0).magnitude() == Llama3(4.0, 1.0, 4.0, 64).magnitude() == 1.0
