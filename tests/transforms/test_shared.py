"""The shared form of a fit gives all blocks of a site one matrix, and else what it gave before."""

import jax
import numpy as np
import pytest

from duquantpp_jax.recipes import recipe
from tests.conftest import stats_of
from tests.transforms.test_closed_forms import _site

KEY = jax.random.key(3)


def matrices_of(name):
    weights, x = _site()
    method = recipe(name, "floor")
    transform = method.fit(weights, stats_of(x), method, KEY).transform
    return np.asarray(transform.as_blocks(64, 32).whole(64, 32)[1])


@pytest.mark.parametrize("name", ["duquantpp", "wush_conditioned", "pca", "random_hadamard"])
def test_all_blocks_share_a_matrix_that_without_the_word_differs_by_block(name):
    first, second = matrices_of(f"{name}:shared")
    np.testing.assert_array_equal(first, second)
    first, second = matrices_of(name)
    assert np.any(first != second)
