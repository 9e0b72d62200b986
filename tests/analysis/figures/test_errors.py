"""Outlines, steps and points are the errors of blocks."""

import numpy as np
import pytest

from duquantpp_jax.analysis import figures

RNG = np.random.default_rng(0)
ERRORS = {name: RNG.lognormal(-3, 1, 300) for name in ("rtn", "hadamard")}
WITH_ZEROS = {"rtn": np.array([0.0, 0.5, 0.25]), "hadamard": np.array([0.25, 0.0, 0.125])}


def test_counts_of_a_histogram_are_those_of_their_bins_and_sum_to_all_blocks():
    figure = figures.error_histogram(ERRORS)
    (axes,) = figure.axes
    for outline, (name, errors) in zip(axes.patches, ERRORS.items(), strict=True):
        counts, edges, _ = outline.get_data()
        assert outline.get_label() == name
        assert counts.sum() == len(errors)
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
            assert count == np.sum((errors >= low) & (errors < high))
        octaves = np.log2(edges)
        np.testing.assert_allclose(np.diff(octaves), np.diff(octaves)[0])
        assert set(np.arange(octaves[0], octaves[-1] + 1)) <= set(octaves)


def test_blocks_without_error_are_counted_in_the_legend():
    (axes,) = figures.error_histogram(WITH_ZEROS).axes
    for outline in axes.patches:
        assert outline.get_data().values.sum() == 2
        assert outline.get_label().endswith("(1 without error)")


def test_steps_rise_by_one_block_at_each_error():
    (axes,) = figures.error_ecdf(ERRORS | {"zeros": WITH_ZEROS["rtn"]}).axes
    *lines, zeros = axes.lines
    for line, (name, errors) in zip(lines, ERRORS.items(), strict=True):
        assert line.get_label() == name
        assert line.get_drawstyle() == "steps-post"
        at, share = line.get_data()
        np.testing.assert_array_equal(at, np.sort(errors))
        np.testing.assert_allclose(share, [np.mean(errors <= e) for e in at])
    assert zeros.get_ydata().tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert axes.get_xscale() == "log"


def _offsets(axes):
    return np.ma.getdata(axes.collections[0].get_offsets())


def test_points_are_pairs_and_the_diagonal_is_where_both_are_alike():
    (axes,) = figures.error_scatter(ERRORS).axes
    np.testing.assert_array_equal(_offsets(axes), np.transpose(list(ERRORS.values())))
    (diagonal,) = axes.lines
    np.testing.assert_array_equal(*diagonal.get_data())
    assert axes.get_xlim() == axes.get_ylim() == tuple(diagonal.get_xdata())
    less = np.mean(ERRORS["hadamard"] < ERRORS["rtn"])
    assert axes.get_title() == f"hadamard errs less in {100 * less:.1f} % of 300 blocks"
    assert axes.get_xlabel().endswith(", rtn")
    assert axes.get_ylabel().endswith(", hadamard")


def test_pairs_with_a_zero_are_left_out_and_said_to_be():
    (axes,) = figures.error_scatter(WITH_ZEROS).axes
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
        (lambda: figures.error_histogram({"a": np.array([-1.0])}), "'a' go down to -1"),
        (lambda: figures.error_scatter({"a": np.ones(2)}), "1 methods: a paired scatter is of 2"),
        (
            lambda: figures.error_scatter({"a": np.ones(2), "b": np.ones(3)}),
            "a has 2 blocks and b 3",
        ),
        (lambda: figures.block_errors(ERRORS, ("rtn", "x")), "'x' is not among rtn, hadamard"),
    ],
)
def test_errors_that_cannot_be_drawn_are_refused(draw, said):
    with pytest.raises(ValueError, match=said):
        draw()
