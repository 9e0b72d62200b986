"""Clustered intervals against the t interval they are for equal clusters, and their coverage."""

import numpy as np
import pytest
from scipy import stats

from duquantpp_jax.evaluation.intervals import clusters, mean_interval


def test_rows_that_are_their_own_clusters_give_the_t_interval():
    values = np.random.default_rng(0).normal(size=30)
    mean, low, high = mean_interval(values, np.arange(30))
    wanted = stats.t.interval(0.95, 29, values.mean(), stats.sem(values))
    np.testing.assert_allclose([mean, low, high], [values.mean(), *wanted], rtol=1e-12)


def test_equal_clusters_give_the_t_interval_of_their_means():
    values = np.random.default_rng(0).normal(size=(10, 6))
    _, low, high = mean_interval(values.ravel(), np.repeat(np.arange(10), 6))
    means = values.mean(axis=1)
    wanted = stats.t.interval(0.95, 9, means.mean(), stats.sem(means))
    np.testing.assert_allclose([low, high], wanted, rtol=1e-12)


def test_clustered_rows_are_covered_as_promised():
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(12), 8)
    hits = 0
    for _ in range(2000):
        values = rng.normal(size=12)[cluster] + 0.3 * rng.normal(size=96)
        _, low, high = mean_interval(values, cluster)
        hits += low <= 0 <= high
    assert 0.935 < hits / 2000 < 0.965


def test_no_difference_has_an_interval_of_nothing():
    assert mean_interval(np.zeros(20), np.repeat(np.arange(10), 2)) == (0.0, 0.0, 0.0)


def test_one_cluster_has_no_interval():
    mean, low, high = mean_interval(np.ones(3), np.zeros(3, int))
    assert mean == 1.0
    assert np.isnan([low, high]).all()


@pytest.mark.parametrize(("documents", "unit"), [(8, "document"), (7, "row")])
def test_documents_are_clusters_where_there_are_eight(documents, unit):
    rows = np.repeat(np.arange(documents) * 3, 2)
    name, cluster = clusters(rows)
    assert name == unit
    assert len(np.unique(cluster)) == (documents if unit == "document" else 2 * documents)
