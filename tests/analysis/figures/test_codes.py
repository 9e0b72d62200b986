"""Bars are counts of exponents and shares of codes."""

import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.analysis import figures
from duquantpp_jax.formats import MXFP4

RNG = np.random.default_rng(0)


def _bars(axes):
    return {
        bars.get_label(): {
            round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in bars
        }
        for bars in axes.containers
    }


def test_every_integer_exponent_has_a_bar_and_bars_sum_to_all_blocks():
    given = {"a": np.uint8([[126, 127], [127, 130]]), "b": np.uint8([120, 127, 127])}
    (axes,) = figures.scale_occupancy(given).axes
    bars = _bars(axes)
    assert bars["a"] == {e: {-1: 1, 0: 2, 3: 1}.get(e, 0) for e in range(-7, 4)}
    assert bars["b"] == {e: {-7: 1, 0: 2}.get(e, 0) for e in range(-7, 4)}
    assert axes.get_xticks().tolist() == [-7, -5, -3, -1, 1, 3]
    assert axes.get_xticklabels()[0].get_text() == "$2^{-7}$"
    assert axes.get_xlim() == (-8, 4)


def test_bars_of_exponents_are_those_of_a_quantized_array():
    x = RNG.standard_normal((4, 64)).astype(np.float32)
    quantized = MXFP4().quantize(x)
    (axes,) = figures.scale_occupancy({"x": quantized.scale_bytes()}).axes
    amax = np.abs(x).reshape(-1, 32).max(-1)
    wanted = np.floor(np.log2(amax)) - 2  # FLOOR; the largest element is 1.5 * 2^2
    assert {e: n for e, n in _bars(axes)["x"].items() if n} == {
        int(e): n for e, n in zip(*np.unique(wanted, return_counts=True), strict=True)
    }


def test_a_scale_that_is_nan_is_refused():
    with pytest.raises(ValueError, match="255, which stands for NaN"):
        figures.scale_occupancy({"a": np.uint8([255])})


@pytest.mark.parametrize("columns", [1, 2])
def test_shares_of_codes_stand_over_their_values_and_sum_to_one(columns):
    x = RNG.standard_normal((8, 64)).astype(np.float32)
    quantized = MXFP4().quantize(x)
    shares = {"x": quantized.codes(), "ones": jnp.full(3, 2, jnp.uint8)}
    (axes,) = figures.code_occupancy(shares, columns=columns).axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    halves = ["6", "4", "3", "2", "1.5", "1", "0.5", "0"]
    assert labels == [f"-{half}" for half in halves] + halves[::-1]
    bars = _bars(axes)
    assert sum(bars["x"].values()) == pytest.approx(1)
    scales = np.asarray(quantized.scales).astype(np.float32).reshape(8, 2, 1)
    elements = (np.asarray(quantized.dequantize()).reshape(8, 2, 32) / scales).ravel()
    for place, label in enumerate(labels):
        same = (elements == float(label)) & (np.signbit(elements) == (label[0] == "-"))
        assert bars["x"][place] == pytest.approx(np.mean(same))
    assert bars["ones"] == {place: float(label == "1") for place, label in enumerate(labels)}


def test_a_code_beyond_four_bits_is_refused():
    with pytest.raises(ValueError, match="code 16 of 'a' is not one of E2M1"):
        figures.code_occupancy({"a": np.uint8([16])})
