"""Images are the matrices, lines the history of learning."""

import numpy as np
import pytest

from duquantpp_jax.analysis import figures

RNG = np.random.default_rng(0)


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
