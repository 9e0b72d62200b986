"""Roofs are min(peak, bandwidth * intensity), kernels the points that were given."""

import numpy as np
import pytest

from duquantpp_jax.analysis import figures

PEAKS = {"MXFP4": 9e15, "bfloat16": 2.25e15}
KERNELS = {"matmul": (5000.0, 8e15), "rotate": (20.0, 1.5e14)}


def test_roofs_and_points_are_the_numbers():
    (axes,) = figures.roofline(PEAKS, 8e12, KERNELS).axes
    roofs, points = axes.lines[:2], axes.lines[2:]
    for roof, (name, peak) in zip(roofs, PEAKS.items(), strict=True):
        x, y = roof.get_data()
        np.testing.assert_allclose(y, np.minimum(peak, 8e12 * x) / 1e12)
        assert peak / 8e12 in x  # the ridge itself is drawn
        assert roof.get_label() == f"{name}: {peak / 1e12:,.0f} TFLOP/s, 8 TB/s"
    for point, (name, (intensity, reached)) in zip(points, KERNELS.items(), strict=True):
        assert point.get_data() == ([intensity], [reached / 1e12])
        assert point.get_label() == name
        assert axes.get_xlim()[0] < intensity < axes.get_xlim()[1]
        assert axes.get_ylim()[0] < reached / 1e12 < axes.get_ylim()[1]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    labels = axes.xaxis.get_major_formatter().format_ticks(axes.get_xticks())
    assert labels == [f"{tick:,.0f}" for tick in axes.get_xticks()]


@pytest.mark.parametrize(
    ("given", "said"),
    [(({}, 1.0, {}), "no peaks"), (({"a": 1.0}, 0.0, {}), "positive finite numbers")],
)
def test_what_is_no_roof_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        figures.roofline(*given)
