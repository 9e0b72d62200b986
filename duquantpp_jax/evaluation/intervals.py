"""Confidence intervals of means over rows that come in clusters.

Rows of one document are alike, so the mean m over N rows in G clusters has, with r_g the sum of
(row - m) over cluster g,

    se^2 = G / (G - 1) sum_g r_g^2 / N^2,      m +- t(.975, G - 1) se,

which for clusters of one size is the t interval of the cluster means. A paired difference is the
same with the row's difference in place of the row.

Source: Cameron and Miller, A Practitioner's Guide to Cluster-Robust Inference, 2015, section II.
"""

import numpy as np
from jaxtyping import Float, Integer
from scipy.special import stdtrit

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
    mean = float(np.mean(values))
    residuals = np.bincount(cluster, weights=values - mean)
    count = len(residuals)
    if count < 2:
        return mean, float("nan"), float("nan")
    error = np.sqrt(count / (count - 1) * np.sum(residuals**2)) / len(values)
    half = float(stdtrit(count - 1, 0.975) * error)
    return mean, mean - half, mean + half
