"""Confidence intervals of means over rows that come in clusters.

Rows of one document are alike, so the mean m over N rows in G clusters has, with r_g the sum of
(row - m) over cluster g,

    se^2 = G / (G - 1) sum_g r_g^2 / N^2,      m +- t(.975, G - 1) se,

which for clusters of one size is the t interval of the cluster means. A paired difference is the
same with the row's difference in place of the row. Of n differences judged together, the k-th
least p-value counts n - k + 1 fold (Holm), so that with probability .95 none is called
significant by chance.

Sources: Cameron and Miller, A Practitioner's Guide to Cluster-Robust Inference, 2015, section II;
Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer
from scipy.special import stdtr, stdtrit

LEAST_DOCUMENTS = 8
"""With fewer documents than this, rows are the clusters."""


def clusters(documents: Integer[np.ndarray, " rows"]) -> tuple[str, Integer[np.ndarray, " rows"]]:
    """What clusters are ("document" or "row"), and the number of each row's cluster."""
    names, numbers = np.unique(documents, return_inverse=True)
    if len(names) >= LEAST_DOCUMENTS:
        return "document", numbers
    return "row", np.arange(len(documents))


def mean_interval(
    values: Float[np.ndarray, " rows"], cluster: Integer[np.ndarray, " rows"]
) -> tuple[float, float, float]:
    """The mean over rows and the ends of its 95 % interval (NaN with a single cluster)."""
    mean, error, count = _clustered(values, cluster)
    if count < 2:
        return mean, float("nan"), float("nan")
    half = float(stdtrit(count - 1, 0.975) * error)
    return mean, mean - half, mean + half


def p_value(values: Float[np.ndarray, " rows"], cluster: Integer[np.ndarray, " rows"]) -> float:
    """Two-sided p-value of a mean of zero (1 where all values are zero, NaN with one cluster)."""
    mean, error, count = _clustered(values, cluster)
    if count < 2:
        return float("nan")
    if mean == 0:
        return 1.0
    return float(2 * stdtr(count - 1, -abs(mean) / error)) if error > 0 else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being judged together: significant where at most .05."""
    adjusted = [0.0] * len(p_values)
    least = 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted


def _clustered(
    values: Float[np.ndarray, " rows"], cluster: Integer[np.ndarray, " rows"]
) -> tuple[float, float, int]:
    """The mean over rows, its standard error (zero with one cluster) and the number of clusters."""
    mean = float(np.mean(values))
    residuals = np.bincount(cluster, weights=values - mean)
    count = len(residuals)
    scale = count / (count - 1) if count > 1 else 0.0
    return mean, float(np.sqrt(scale * np.sum(residuals**2)) / len(values)), count
