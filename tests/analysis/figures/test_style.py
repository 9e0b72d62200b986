"""Parts, limits and ticks that figures share."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duquantpp_jax.analysis.figures import style


@given(st.integers(1, 5000), st.integers(1, 600))
def test_parts_are_even_and_begin_at_zero(size, most):
    starts = style.starts(size, most)
    assert starts[0] == 0
    assert len(starts) == min(size, most)
    lengths = np.diff(np.append(starts, size))
    assert lengths.min() >= 1
    assert np.ptp(lengths) <= 1


@given(st.lists(st.floats(2.0**-100, 2.0**100), min_size=1))
def test_powers_of_two_are_the_nearest_around(values):
    low, high = style.powers_of_two(np.array(values))
    assert low < high
    assert low <= min(values) < 2 * low
    assert max(values) <= high
    assert high < 2 * max(values) or high == 2 * low
    assert np.frexp([low, high])[0].tolist() == [0.5, 0.5]


def test_zeros_have_no_part_in_powers_of_two():
    assert style.powers_of_two(np.array([0.0, 3.0])) == (2, 4)
    assert style.powers_of_two(np.zeros(3)) == (1, 2)


def test_a_figure_of_three_columns_is_refused():
    with pytest.raises(ValueError, match="columns = 3: a figure is 1 or 2 columns wide"):
        style.blank(3, 1.0)
