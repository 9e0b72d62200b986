"""Statistics of outliers: closed forms, plain NumPy, and any split into batches."""

import functools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duquantpp_jax.analysis.outliers import Moments, Thresholds, observe, statistics

look = jax.jit(observe, static_argnames="thresholds")
PLAIN = Thresholds()


def moments_of(x, thresholds=PLAIN) -> Moments:
    x = np.asarray(x, np.float32)
    return look(x, thresholds).in_float64()


def found(x, thresholds=PLAIN):
    return statistics(moments_of(x, thresholds), thresholds)


def gaussian(rows=4, length=64, width=64, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, length, width)).astype(np.float32)


def plainly(x, thresholds):
    """The equations at the top of the file, in NumPy and float64, block by block."""
    x = np.asarray(x, np.float64)
    tokens, energy = x.reshape(-1, x.shape[-1]), np.square(x).sum(axis=(0, 1))
    absmax = np.abs(tokens).max(axis=0)
    top = max(1, round(thresholds.share * len(absmax)))
    alone = alive = 0
    for token in np.abs(tokens):
        for first in range(0, len(token), thresholds.block_size):
            *_, second, largest = [0.0, *np.sort(token[first : first + thresholds.block_size])]
            if largest > 0:
                alive += 1
                alone += second == 0 or (
                    math.frexp(largest)[1] - math.frexp(second)[1] >= thresholds.drop
                )
    positions = np.abs(x).max(axis=(0, 2))
    return {
        "largest": absmax.max(),
        "largest_channel": absmax.argmax(),
        "max_over_median": absmax.max() / np.median(absmax),
        "outlier_channels": (absmax > thresholds.ratio * np.median(absmax)).sum(),
        "kurtosis": np.mean(x**4) / np.mean(x**2) ** 2,
        "top_energy": np.sort(energy)[-top:].sum() / energy.sum(),
        "set_by_one": alone / alive,
        "position": positions.argmax(),
        "position_over_median": positions.max() / np.median(positions),
    }


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([Thresholds(), Thresholds(16, 3.0, 0.1, 2)]),
    st.sampled_from([64, 40]),
)
def test_statistics_are_their_equations(seed, thresholds, width):
    rng = np.random.default_rng(seed)
    x = (rng.standard_t(2, (3, 8, width)) * 2.0 ** rng.integers(-4, 5, width)).astype(np.float32)
    x[rng.random(x.shape) < 0.3] = 0
    expected = plainly(x, thresholds)
    got = found(x, thresholds)
    assert list(got) == list(expected)
    for name, value in expected.items():
        # Sums of float32 squares and fourths over 24 tokens; everything else is exact.
        assert got[name] == pytest.approx(value, rel=1e-5), name


def test_gaussian_numbers_have_kurtosis_three():
    x = gaussian(32, 64, 64)
    assert found(x)["kurtosis"] == pytest.approx(3, abs=5 * math.sqrt(24 / x.size))


def test_one_planted_channel_is_found_with_its_blocks():
    x = np.ones((2, 16, 64), np.float32)
    x[:, :, 37] = 12
    x[1, 5, 37] = 16
    got = found(x)
    assert got["largest_channel"] == 37
    assert got["max_over_median"] == 16
    assert got["outlier_channels"] == 1
    assert got["set_by_one"] == 0.5  # the second block of every token
    assert got["position"] == 5
    energy = 31 * 144 + 256
    assert got["top_energy"] == pytest.approx(energy / (energy + 32 * 63), rel=1e-6)


def test_a_scale_is_set_by_one_where_it_falls_by_the_stated_power():
    def share(largest, rest, drop):
        x = np.full((1, 1, 32), rest, np.float32)
        x[..., 3] = largest
        return found(x, Thresholds(drop=drop))["set_by_one"]

    assert share(1.0, np.nextafter(np.float32(1), np.float32(0)), 1) == 1
    assert share(1.99, 1.0, 1) == 0
    assert share(4.0, 1.0, 2) == 1
    assert share(4.0, 1.01, 3) == 0
    assert share(1.0, 0.0, 9) == 1
    assert share(2.0**-140, 2.0**-141, 1) == 1  # subnormal


def test_two_equal_largest_elements_set_no_scale_alone():
    x = np.ones((1, 1, 32), np.float32)
    x[..., :2] = 64
    assert found(x)["set_by_one"] == 0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_merging_batches_is_one_pass(seed, cut):
    x = gaussian(6, 16, 32, seed)
    parts = functools.reduce(Moments.merge, [moments_of(x[:cut]), moments_of(x[cut:])])
    whole = statistics(moments_of(x), PLAIN)
    for name, value in statistics(parts, PLAIN).items():
        assert value == pytest.approx(whole[name], rel=1e-5), name


def test_zeros_have_no_ratios_and_large_numbers_do_not_overflow():
    nothing = found(np.zeros((1, 4, 32)))
    assert nothing["largest"] == 0
    assert [name for name, value in nothing.items() if value is None] == [
        *("max_over_median", "kurtosis", "top_energy", "set_by_one", "position_over_median"),
    ]
    x = gaussian()
    assert found(x * 2.0**100)["kurtosis"] == pytest.approx(found(x)["kurtosis"], rel=1e-6)


def test_nan_and_bad_thresholds_are_refused():
    x = gaussian(1, 4, 32)
    x[0, 1, 2] = np.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        found(x)
    for wrong in ({"block_size": 0}, {"ratio": 0.0}, {"share": 0.0}, {"share": 1.5}, {"drop": 0}):
        with pytest.raises(ValueError, match="give"):
            Thresholds(**wrong)
