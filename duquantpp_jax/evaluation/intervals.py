"""Confidence intervals of means over rows of text; text and seeds are sources of variance.

Rows of the same document are alike, so text counts by cluster. With r_g the sum of (row - mean)
over the rows of cluster g, N rows and G clusters, the variance of a mean due to text is

    V_text = G / (G - 1) sum_g r_g^2 / N^2                         with G - 1 degrees of freedom.

For clusters of equal size this is the variance of the cluster means over G. A method that draws
random numbers is measured with S seeds. Its rows are averaged over seeds before V_text is taken,
and with m_s the mean over all rows for seed s,

    V_seed = sum_s (m_s - m)^2 / (S - 1) / S                       with S - 1 degrees of freedom.

The interval is m +- t(.975, f) sqrt(V), where V is the sum of these variances V_i with f_i degrees
of freedom, and f = V^2 / sum_i V_i^2 / f_i (Satterthwaite). The interaction of seed and text is in
both terms, so V counts a share of 1 / (S G) of it twice, which makes intervals a little wider.
Satterthwaite's f, itself an estimate, makes intervals narrower if there are few seeds that vary
more than text: with three seeds (two) 95 % intervals of normal numbers cover .94 (.93) of the time
if both variances are equal, and .93 (.87) if seeds have 16 times the variance of text.

A paired difference replaces the row by the row's difference. If both methods were measured with
the same seeds, each seed is paired with itself. If not, rows are averaged over seeds first, and
each side has its own V_seed (Welch).

Of n differences judged together, the k-th smallest p-value is multiplied by n - k + 1 (Holm), so
that with probability .95 no difference is called significant by chance.

Sources: Cameron and Miller, A Practitioner's Guide to Cluster-Robust Inference, 2015, section II;
Cameron, Gelbach and Miller, Robust Inference with Multiway Clustering, 2011 (their third term, of
the intersection, is counted twice here); Satterthwaite, An Approximate Distribution of Estimates
of Variance Components, 1946; Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer
from scipy.special import stdtr, stdtrit

LEAST_DOCUMENTS = 8
"""With fewer documents than this, rows are the clusters."""

BySeed = Mapping[int, Float[np.ndarray, " rows"]]
"""Seed -> value of every row of text."""


class Estimate(NamedTuple):
    """A mean over rows and seeds, with its confidence.

    Attributes:
      ci95: Ends of the 95 % interval; None if there is a single cluster.
      p: Two-sided p-value of a mean of zero; None if there is a single cluster.
      sources: Sources of variance in the interval: "text", or "text and seeds".
    """

    mean: float
    ci95: tuple[float, float] | None
    p: float | None
    sources: str


def clusters(documents: Integer[np.ndarray, " rows"]) -> tuple[str, Integer[np.ndarray, " rows"]]:
    """The unit of clusters, "document" or "row", and the cluster of each row.

    >>> clusters(np.arange(20) // 2)[0], clusters(np.zeros(20, int))[0]
    ('document', 'row')
    """
    names, numbers = np.unique(documents, return_inverse=True)
    if len(names) >= LEAST_DOCUMENTS:
        return "document", numbers
    return "row", np.arange(len(documents))


def clustered(unit: str, count: int) -> str:
    """What `clusters` made of a text, in words; says where intervals are worth little."""
    said = f"clustered by {unit} ({count})"
    if unit == "row":
        said += f", as if rows were independent, for want of {LEAST_DOCUMENTS} documents"
    return said if count >= LEAST_DOCUMENTS else f"{said}: too few for an interval to say much"


def estimate(
    values: BySeed, cluster: Integer[np.ndarray, " rows"], base: BySeed | None = None
) -> Estimate:
    """The mean of values, or of their paired difference to those of a comparator, `base`.

    >>> kl = {0: np.array([0.2, 0.4, 0.3, 0.3, 0.2, 0.2])}  # by seed, a number for each row
    >>> found = estimate(kl, np.array([0, 0, 1, 1, 2, 2]))
    >>> f"{found.mean:.2f}", [f"{bound:.2f}" for bound in found.ci95]
    ('0.27', ['0.12', '0.41'])

    Args:
      cluster: The cluster of each row.

    Raises:
      ValueError: No seed, or another number of rows than in `cluster`.
    """
    sides = [_stacked(values, cluster)]
    if base is not None:
        if values.keys() == base.keys():
            sides = [sides[0] - _stacked({seed: base[seed] for seed in values}, cluster)]
        else:
            sides.append(-_stacked(base, cluster))
    rows = np.sum([side.mean(axis=0) for side in sides], axis=0)
    mean, count = float(rows.mean()), len(np.unique(cluster))
    several = [side for side in sides if len(side) > 1]
    seeds = [(np.var(s.mean(axis=1), ddof=1) / len(s), len(s) - 1) for s in several]  # V_seed
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
    """p-values adjusted for judging all of them together; significant if at most .05.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, least = [0.0] * len(p_values), 0.0
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
    names, numbers = np.unique(cluster, return_inverse=True)
    residuals, count = np.bincount(numbers, weights=rows - rows.mean()), len(names)
    return float(count / (count - 1) * np.sum(residuals**2) / len(rows) ** 2)
