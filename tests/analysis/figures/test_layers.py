"""Heat maps hold the maxima, lines the SQNR."""

import numpy as np
import pytest

from duquantpp_jax.analysis import figures

RNG = np.random.default_rng(0)
AMAX = {
    "attention_in": RNG.uniform(0.1, 3, (3, 64)).astype(np.float32),
    "mlp_out": RNG.uniform(0.1, 90, (3, 96)).astype(np.float32),
}


def _cells(axes):
    return np.ma.getdata(axes.collections[0].get_array())


def test_cells_are_the_maxima_of_channels_in_one_set_of_log2_colours():
    figure = figures.amax_map(AMAX)
    *panels, bar = figure.axes
    for axes, (site, amax) in zip(panels, AMAX.items(), strict=True):
        np.testing.assert_array_equal(_cells(axes), amax)
        assert axes.get_title() == site
        assert axes.get_xlim() == (-0.5, amax.shape[1] - 0.5)
        assert axes.get_ylim() == (2.5, -0.5)  # the first layer on top
        norm = axes.collections[0].norm
        assert (norm.vmin, norm.vmax) == (2.0**-4, 2.0**7)
        assert norm([2.0**-4, 2.0**1.5, 2.0**7]).tolist() == pytest.approx([0, 0.5, 1])
    exponents = np.log2(bar.get_yticks())
    np.testing.assert_array_equal(exponents, np.round(exponents))


def test_cells_are_the_maxima_of_blocks():
    figure = figures.amax_map(AMAX, block_size=32)
    for axes, amax in zip(figure.axes, AMAX.values(), strict=False):
        np.testing.assert_array_equal(_cells(axes), amax.reshape(3, -1, 32).max(-1))
    assert figure.axes[1].get_xlabel() == "block of 32 channels"


def test_a_large_channel_among_thousands_is_still_there():
    amax = np.ones((2, 4096))
    amax[1, 3001] = 64.0
    cells = _cells(figures.amax_map({"s": amax}).axes[0])
    assert cells.shape == (2, 512)
    assert np.argwhere(cells == 64).tolist() == [[1, 3001 // 8]]


def test_blocks_that_do_not_divide_a_width_are_refused():
    with pytest.raises(ValueError, match="mlp_out: a width of 96 is not a multiple of block 64"):
        figures.amax_map(AMAX, block_size=64)


METHODS = {
    name: {"attention_in": RNG.uniform(15, 20, (4, 3)), "mlp_out": RNG.uniform(15, 20, (4, 1))}
    for name in ("rtn", "block_hadamard")
}


@pytest.mark.parametrize("columns", [1, 2])
def test_lines_are_means_over_linears_and_dots_the_linears(columns):
    figure = figures.sqnr(METHODS, columns=columns)
    for axes, site in zip(figure.axes, ("attention_in", "mlp_out"), strict=True):
        assert axes.get_title() == site
        lines = iter(axes.lines)
        for name, sites in METHODS.items():
            mean = next(lines)
            assert mean.get_label() == name
            np.testing.assert_array_equal(mean.get_xdata(), np.arange(4))
            np.testing.assert_array_equal(mean.get_ydata(), sites[site].mean(axis=1))
            for linear in sites[site].T:
                dots = next(lines)
                np.testing.assert_array_equal(dots.get_ydata(), linear)
                np.testing.assert_array_equal(np.round(dots.get_xdata()), np.arange(4))
        assert next(lines, None) is None
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(METHODS)


def test_methods_with_other_sites_are_refused():
    with pytest.raises(ValueError, match=r"b has sites \['s'\]: give all methods the sites"):
        figures.sqnr({"a": METHODS["rtn"], "b": {"s": np.ones((4, 1))}})
