"""Confidence intervals of means over rows of text, with text and seeds as sources of variance.

Rows of one document are alike, so text counts by cluster. With r_g the sum of (row - mean) over
the rows of cluster g, N rows and G clusters, the variance that text gives a mean is

    V_text = G / (G - 1) sum_g r_g^2 / N^2                         with G - 1 degrees of freedom,

which for clusters of one size is that of the cluster means over G. A method that draws random
numbers is measured with S seeds. Its rows are averaged over seeds before V_text is taken, and
with m_s the mean over all rows for seed s,

    V_seed = sum_s (m_s - m)^2 / (S - 1) / S                       with S - 1 degrees of freedom.

The interval is m +- t(.975, f) sqrt(V), where V is the sum of these variances V_i with f_i degrees
of freedom, and f = V^2 / sum_i V_i^2 / f_i (Satterthwaite). The part of the variance that belongs
to a seed on a text, and to neither alone, is in both terms: V counts it twice, a share of
1 / (S G) of it each time, which makes intervals a little wider. Satterthwaite's f, itself an
estimate, makes them narrower where seeds are few and vary more than text: with three seeds (two)
95 % intervals of normal numbers cover .94 (.93) of the time where both give the same variance, and
.93 (.87) where seeds give 16 times that of text.

A paired difference is the same with the row's difference in place of the row. Where both methods
were measured with the same seeds, a seed's difference is taken with that seed on both sides. Where
they were not, rows are averaged over seeds first, and either side has its own V_seed (Welch).

Of n differences judged together, the k-th least p-value counts n - k + 1 fold (Holm), so that with
probability .95 none is called significant by chance.

Sources: Cameron and Miller, A Practitioner's Guide to Cluster-Robust Inference, 2015, section II;
Cameron, Gelbach and Miller, Robust Inference with Multiway Clustering, 2011 (whose third term, of
the intersection, is what is counted twice here); Satterthwaite, An Approximate Distribution of
Estimates of Variance Components, 1946; Holm, A Simple Sequentially Rejective Multiple Test
Procedure, 1979.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from scipy.special import stdtr, stdtrit

LEAST_DOCUMENTS = 8
"""With fewer documents than this, rows are the clusters."""

BySeed = Mapping[int, Float[np.ndarray, " rows"]]
"""Values of every row of text, for each seed."""


class Estimate(NamedTuple):
    """A mean, and how well it is known.

    Attributes:
      mean: Over rows and seeds.
      ci95: Ends of its 95 % interval; None with a single cluster.
      p: Two-sided p-value of a mean of zero; None with a single cluster.
      sources: What the interval accounts for: "text", or "text and seeds".
    """

    mean: float
    ci95: tuple[float, float] | None
    p: float | None
    sources: str


def clusters(documents: Integer[np.ndarray, " rows"]) -> tuple[str, Integer[np.ndarray, " rows"]]:
    """What clusters are ("document" or "row"), and the number of each row's cluster."""
    names, numbers = np.unique(documents, return_inverse=True)
    if len(names) >= LEAST_DOCUMENTS:
        return "document", numbers
    return "row", np.arange(len(documents))


def estimate(
    values: BySeed, cluster: Integer[np.ndarray, " rows"], base: BySeed | None = None
) -> Estimate:
    """The mean of values, or of their paired difference to those of a comparator.

    Args:
      values: Of one method; a single seed has no variance of seeds.
      cluster: Number of each row's cluster.
      base: Of the comparator, on the same rows.

    Raises:
      ValueError: No seed, or values of another number of rows than `cluster`.
    """
    sides = [_stacked(values, cluster)]
    if base is not None:
        if values.keys() == base.keys():
            sides = [sides[0] - _stacked({seed: base[seed] for seed in values}, cluster)]
        else:
            sides.append(-_stacked(base, cluster))
    rows = np.sum([side.mean(axis=0) for side in sides], axis=0)
    mean, count = float(rows.mean()), len(np.unique(cluster))
    seeds = [(_seed_variance(side), len(side) - 1) for side in sides if len(side) > 1]
    sources = "text and seeds" if seeds else "text"
    if count < 2:
        return Estimate(mean, None, None, sources)
    variances, freedom = np.array([(_text_variance(rows, cluster), count - 1), *seeds]).T
    variance = variances.sum()
    if variance == 0:
        return Estimate(mean, (mean, mean), float(mean == 0), sources)
    freedom = variance**2 / np.sum(variances**2 / freedom)
    half = float(stdtrit(freedom, 0.975) * np.sqrt(variance))
    p = float(2 * stdtr(freedom, -abs(mean) / np.sqrt(variance)))
    return Estimate(mean, (mean - half, mean + half), p, sources)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being judged together: significant where at most .05."""
    adjusted = [0.0] * len(p_values)
    least = 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted


def _stacked(
    values: BySeed, cluster: Integer[np.ndarray, " rows"]
) -> Float[np.ndarray, "seeds rows"]:
    if not values or any(rows.shape != cluster.shape for rows in values.values()):
        raise ValueError(
            f"an interval needs {len(cluster)} rows for every seed, a row's cluster each: got "
            f"{ {seed: rows.shape for seed, rows in values.items()} }"
        )
    return np.stack([np.asarray(rows, np.float64) for rows in values.values()])


def _text_variance(
    rows: Float[np.ndarray, " rows"], cluster: Integer[np.ndarray, " rows"]
) -> float:
    """V_text of the mean over rows in at least two clusters."""
    _, numbers = np.unique(cluster, return_inverse=True)
    residuals = np.bincount(numbers, weights=rows - rows.mean())
    count = len(residuals)
    return float(count / (count - 1) * np.sum(residuals**2) / len(rows) ** 2)


def _seed_variance(side: Float[np.ndarray, "seeds rows"]) -> float:
    """V_seed of the mean over at least two seeds."""
    return float(np.var(side.mean(axis=1), ddof=1) / len(side))
