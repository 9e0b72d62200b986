"""Intervals against exact t intervals, and how often they cover the truth with text and seeds."""

import numpy as np
import pytest
from scipy import stats

from duquantpp_jax.evaluation.intervals import clustered, clusters, estimate, holm


def test_rows_that_are_their_own_clusters_give_the_t_test():
    values = np.random.default_rng(0).normal(size=30) + 0.2
    found = estimate({0: values}, np.arange(30))
    wanted = stats.t.interval(0.95, 29, values.mean(), stats.sem(values))
    np.testing.assert_allclose([found.mean, *found.ci95], [values.mean(), *wanted], rtol=1e-12)
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert found.sources == "text"


def test_equal_clusters_give_the_t_test_of_their_means():
    values = np.random.default_rng(0).normal(size=(10, 6)) + 0.3
    found = estimate({0: values.ravel()}, np.repeat(np.arange(10), 6))
    means = values.mean(axis=1)
    wanted = stats.t.interval(0.95, 9, means.mean(), stats.sem(means))
    np.testing.assert_allclose(found.ci95, wanted, rtol=1e-12)
    assert found.p == pytest.approx(stats.ttest_1samp(means, 0).pvalue)


def test_seeds_that_shift_all_rows_alike_give_the_t_test_of_their_means():
    """Text then gives a difference no variance at all."""
    base = np.random.default_rng(0).normal(size=12)
    shifts = np.array([0.1, -0.2, 0.5, 0.3])
    found = estimate(
        {seed: base + shift for seed, shift in enumerate(shifts)}, np.arange(12), {0: base}
    )
    wanted = stats.t.interval(0.95, 3, shifts.mean(), stats.sem(shifts))
    np.testing.assert_allclose(found.ci95, wanted, rtol=1e-6)
    assert found.p == pytest.approx(stats.ttest_1samp(shifts, 0).pvalue, rel=1e-6)
    assert found.sources == "text and seeds"


def test_both_variances_add_and_satterthwaite_gives_their_freedom():
    rng = np.random.default_rng(1)
    rows, shifts = rng.normal(size=9), np.array([0.4, -0.1, 0.6])
    found = estimate({seed: rows + shift for seed, shift in enumerate(shifts)}, np.arange(9))
    text, seeds = rows.var(ddof=1) / 9, shifts.var(ddof=1) / 3
    freedom = (text + seeds) ** 2 / (text**2 / 8 + seeds**2 / 2)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(text + seeds)
    np.testing.assert_allclose(np.diff(found.ci95), 2 * half, rtol=1e-9)


def test_the_same_seeds_are_paired_and_others_count_on_each_side():
    """With each side's text equal, paired seeds that move together leave nothing, and unpaired
    ones give the Welch interval."""
    text, a, b = np.random.default_rng(0).normal(size=20), [0.1, 0.5, 0.9], [0.0, 0.4, 0.8]
    cluster = np.arange(20)
    values = {seed: text + shift for seed, shift in enumerate(a)}
    paired = estimate(values, cluster, {seed: text + shift for seed, shift in enumerate(b)})
    np.testing.assert_allclose(paired.ci95, [0.1, 0.1], atol=1e-12)
    unpaired = estimate(values, cluster, {seed + 7: text + shift for seed, shift in enumerate(b)})
    wanted = stats.ttest_ind(a, b, equal_var=False)
    np.testing.assert_allclose(unpaired.ci95, wanted.confidence_interval(), rtol=1e-6)
    assert unpaired.p == pytest.approx(wanted.pvalue, rel=1e-6)


def test_text_and_seeds_are_covered_as_promised_and_text_alone_is_not():
    """Three seeds, 16 documents of 4 rows; a seed's own shift is half a document's."""
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(16), 4)
    hits = alone = 0
    for _ in range(1000):
        text = rng.normal(size=16)[cluster]
        shifts, own = 0.5 * rng.normal(size=3), 0.5 * rng.normal(size=(3, 16))[:, cluster]
        values = dict(enumerate(text + shifts[:, None] + own + rng.normal(size=(3, 64))))
        low, high = estimate(values, cluster).ci95
        hits += low <= 0 <= high
        low, high = estimate({0: np.mean(list(values.values()), axis=0)}, cluster).ci95
        alone += low <= 0 <= high
    assert 0.93 < hits / 1000 < 0.98
    assert alone / 1000 < 0.87


def test_no_difference_has_an_interval_of_nothing_and_a_constant_one_no_doubt():
    values = {0: np.random.default_rng(0).normal(size=20)}
    cluster = np.repeat(np.arange(10), 2)
    assert estimate(values, cluster, values) == (0.0, (0.0, 0.0), 1.0, "text")
    assert estimate({0: np.ones(20)}, cluster) == (1.0, (1.0, 1.0), 0.0, "text")


def test_one_cluster_has_no_interval():
    assert estimate({0: np.ones(3)}, np.zeros(3, int)) == (1.0, None, None, "text")


@pytest.mark.parametrize("values", [{}, {0: np.ones(3), 1: np.ones(2)}])
def test_rows_that_are_not_those_of_the_clusters_are_refused(values):
    with pytest.raises(ValueError, match="3 rows for every seed"):
        estimate(values, np.arange(3))


def test_holm_multiplies_by_what_is_left_and_never_decreases():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1.0, 1.0])
    assert holm([]) == []


@pytest.mark.parametrize(("documents", "unit"), [(8, "document"), (7, "row")])
def test_documents_are_clusters_where_there_are_eight(documents, unit):
    rows = np.repeat(np.arange(documents) * 3, 2)
    name, cluster = clusters(rows)
    assert name == unit
    assert len(np.unique(cluster)) == (documents if unit == "document" else 2 * documents)


def test_words_say_where_intervals_are_worth_little():
    assert clustered("document", 8) == "clustered by document (8)"
    assert clustered("row", 9).endswith("for want of 8 documents")
    assert clustered("row", 2).endswith("too few for an interval to say much")
