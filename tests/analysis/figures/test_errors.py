"""Steps and points are the errors of blocks."""

import numpy as np
import pytest

from duquantpp_jax.analysis import figures

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
