"""A surface is |x|, or the maxima of what its points stand for."""

import jax.numpy as jnp
import numpy as np
import pytest
from mpl_toolkits.mplot3d import Axes3D

from duquantpp_jax.analysis import figures
from duquantpp_jax.analysis.figures.surface import coarse


@pytest.fixture
def drawn(monkeypatch):
    """What plot_surface was given: (x, y, z) of each panel."""
    seen = []
    plain = Axes3D.plot_surface

    def record(self, x, y, z, **options):
        seen.append((np.array(x), np.array(y), np.array(z)))
        return plain(self, x, y, z, **options)

    monkeypatch.setattr(Axes3D, "plot_surface", record)
    return seen


def test_small_inputs_are_drawn_number_by_number(drawn):
    x = np.arange(12.0).reshape(3, 4) - 6
    figure = figures.surface({"before": x, "after": jnp.float32(x / 2)})
    for (channels, tokens, z), scale in zip(drawn, (1, 2), strict=True):
        np.testing.assert_array_equal(z, np.abs(x) / scale)
        np.testing.assert_array_equal(channels, np.broadcast_to(np.arange(4), (3, 4)))
        np.testing.assert_array_equal(tokens, np.broadcast_to(np.arange(3)[:, None], (3, 4)))
    assert [axes.get_title() for axes in figure.axes] == ["before", "after"]


@pytest.mark.parametrize("log2", [False, True])
def test_all_panels_have_one_z_axis_and_one_set_of_colours(log2):
    x = np.random.default_rng(0).standard_normal((8, 8))
    figure = figures.surface({"before": 100 * x, "after": x}, log2=log2)
    limits = {axes.get_zlim() for axes in figure.axes}
    top = np.abs(100 * x).max()
    least = np.abs(x).min()
    wanted = (np.floor(np.log2(least)), np.ceil(np.log2(top))) if log2 else (0, top)
    assert limits == {wanted}
    assert {axes.collections[0].get_clim() for axes in figure.axes} == {wanted}


def test_in_log2_heights_are_exponents_down_to_a_floor(drawn):
    x = np.array([[1.0, 4.0, 0.5], [2.0**-30, 8.0, 1.0]])
    figure = figures.surface({"x": x}, log2=True)
    np.testing.assert_array_equal(drawn[0][2], [[0, 2, -1], [3 - 16, 3, 0]])
    assert figure.axes[0].get_zlim() == (-13, 3)
    figure.draw_without_rendering()
    assert "$2^{0}$" in [label.get_text() for label in figure.axes[0].get_zticklabels()]


def test_one_outlier_survives_being_made_coarse_and_colours_its_facets(drawn):
    x = np.random.default_rng(0).uniform(-1, 1, (1000, 768))
    x[537, 401] = -50.0
    figure = figures.surface({"x": x})
    _, _, z = drawn[0]
    assert z.shape == (64, 96)
    assert z.max() == 50
    row, column = 537 * 64 // 1000, 401 * 96 // 768
    assert np.unravel_index(z.argmax(), z.shape) == (row, column)
    assert figure.axes[0].get_zlim() == (0, 50)
    colours = np.asarray(figure.axes[0].collections[0].get_array()).reshape(63, 95)
    assert np.argwhere(colours == 50).tolist() == [
        [i, j] for i in (row - 1, row) for j in (column - 1, column)
    ]


def test_coarse_maxima_are_of_their_rectangles():
    x = np.random.default_rng(0).uniform(0, 1, (7, 10))
    maxima, tokens, channels = coarse(x, (3, 4))
    edges = [*tokens.astype(int), 7], [*channels.astype(int), 10]
    for i in range(3):
        for j in range(4):
            part = x[edges[0][i] : edges[0][i + 1], edges[1][j] : edges[1][j + 1]]
            assert maxima[i, j] == part.max()


def test_an_input_of_zeros_has_a_z_axis():
    figure = figures.surface({"x": np.zeros((2, 2))})
    assert figure.axes[0].get_zlim() == (0, 1)
    figures.surface({"x": np.zeros((2, 2))}, log2=True).draw_without_rendering()


def test_a_line_is_no_surface_and_bfloat16_is_one(drawn):
    with pytest.raises(ValueError, match=r"x has shape \(1, 8\): give at least 2 tokens"):
        figures.surface({"x": np.ones((1, 8))})
    figures.surface({"x": jnp.array([[1, -2.5], [3, 4]], jnp.bfloat16)})
    np.testing.assert_array_equal(drawn[0][2], [[1, 2.5], [3, 4]])
