"""Steps, points, images, lines and roofs are the numbers that figures are given."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import figures

RNG = np.random.default_rng(0)
ERRORS = {name: RNG.lognormal(-3, 1, 300) for name in ("rtn", "hadamard")}
WITH_ZEROS = {"rtn": np.array([0.0, 0.5, 0.25]), "hadamard": np.array([0.25, 0.0, 0.125])}


def test_steps_rise_by_one_block_at_each_error():
    (axes,) = figures.error_ecdf(ERRORS | {"zeros": WITH_ZEROS["rtn"]}).axes
    *lines, zeros = axes.lines
    for line, (name, errors) in zip(lines, ERRORS.items(), strict=True):
        assert line.get_label() == name
        assert line.get_drawstyle() == "steps-post"
        at, share = line.get_data()
        np.testing.assert_array_equal(at, np.sort(errors))
        np.testing.assert_allclose(share, [np.mean(errors <= e) for e in at])
    assert zeros.get_label() == "zeros (1 without error)"
    assert zeros.get_ydata().tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert axes.get_xscale() == "log"


def _offsets(axes):
    return np.ma.getdata(axes.collections[0].get_offsets())


def test_points_are_pairs_and_the_diagonal_is_where_both_are_alike():
    _, axes = figures.block_errors(ERRORS, ("rtn", "hadamard")).axes
    np.testing.assert_array_equal(_offsets(axes), np.transpose(list(ERRORS.values())))
    (diagonal,) = axes.lines
    np.testing.assert_array_equal(*diagonal.get_data())
    assert axes.get_xlim() == axes.get_ylim() == tuple(diagonal.get_xdata())
    less = np.mean(ERRORS["hadamard"] < ERRORS["rtn"])
    assert axes.get_title() == f"hadamard errs less in {100 * less:.1f} % of 300 blocks"
    assert axes.get_xlabel().endswith(", rtn")
    assert axes.get_ylabel().endswith(", hadamard")


def test_pairs_with_a_zero_are_left_out_and_said_to_be():
    _, axes = figures.block_errors(WITH_ZEROS, ("rtn", "hadamard")).axes
    assert _offsets(axes).tolist() == [[0.25, 0.125]]
    assert axes.get_title() == (
        "hadamard errs less in 66.7 % of 3 blocks\n2 with an error of 0 left out"
    )


def test_block_errors_draws_all_methods_and_one_pair():
    errors = ERRORS | {"greedy": RNG.lognormal(-3, 1, 300)}
    left, right = figures.block_errors(errors, ("greedy", "rtn")).axes
    assert [line.get_label() for line in left.lines] == list(errors)
    np.testing.assert_array_equal(_offsets(right), np.transpose([errors["greedy"], errors["rtn"]]))


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda: figures.error_ecdf({"a": np.array([-1.0])}), "'a' go down to -1"),
        (
            lambda: figures.block_errors({"a": np.ones(2), "b": np.ones(3)}, ("a", "b")),
            "a has 2 blocks and b 3",
        ),
        (lambda: figures.block_errors(ERRORS, ("rtn", "x")), "'x' is not among rtn, hadamard"),
    ],
)
def test_errors_that_cannot_be_drawn_are_refused(draw, said):
    with pytest.raises(ValueError, match=said):
        draw()


def test_images_are_the_matrices_in_colours_symmetric_about_zero():
    matrices = {"a": RNG.standard_normal((8, 8)), "b": 3 * RNG.standard_normal((8, 8))}
    *panels, _ = figures.rotation(matrices).axes
    top = max(np.abs(m).max() for m in matrices.values())
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=True):
        (image,) = axes.images
        np.testing.assert_array_equal(np.ma.getdata(image.get_array()), matrix)
        assert image.get_clim() == (-top, top)
        assert axes.get_title() == name
        white = image.cmap(image.norm(0.0))
        assert min(white) > 0.95


STEPS = np.array([0, 10, 30])
LOSSES = {"training": np.array([0.3, 0.2, 0.1]), "held out": np.array([0.4, 0.3, 0.3])}
FAR = {"mlp_out": np.array([1e-7, 2e-7, 3e-6])}


def test_lines_are_losses_and_distances_from_orthogonal():
    top, bottom = figures.loss_curves(STEPS, LOSSES, FAR).axes
    for axes, lines in ((top, LOSSES), (bottom, FAR)):
        for line, (name, values) in zip(axes.lines, lines.items(), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), STEPS)
            np.testing.assert_array_equal(line.get_ydata(), values)
            assert line.get_label() == name
    assert bottom.get_yscale() == "log"
    assert bottom.get_xlabel() == "step"
    assert top.get_ylabel() == "KL, nats per target"


def test_without_rotations_there_is_only_the_loss():
    (axes,) = figures.loss_curves(STEPS, LOSSES).axes
    assert axes.get_xlabel() == "step"


def test_a_line_without_a_number_for_each_step_is_refused():
    with pytest.raises(ValueError, match="held out has 2 numbers for 3 steps"):
        figures.loss_curves(STEPS, {"held out": np.ones(2)})


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


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 2.0), (2**-10, 2**-3), (2**-40, 2.0**60), (3.0, 5.0)]
)
def test_ticks_are_powers_of_two_evenly_spaced_and_few(low, high):
    axes = Figure().subplots()
    figures.log2_axis(axes, "x", low, high)
    exponents = np.log2(axes.get_xticks())
    assert 1 <= len(exponents) <= 7
    assert np.all(exponents == np.round(exponents))
    assert len(set(np.diff(exponents))) <= 1
    assert low <= axes.get_xticks()[0] <= axes.get_xticks()[-1] <= high
    assert axes.get_xlim() == (low, high)
    assert len(axes.xaxis.get_minorticklocs()) == 0
