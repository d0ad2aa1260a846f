"""95% intervals of means and shares."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

Interval = tuple[float, float, float]
"""Mean, and lower and upper end of its 95% interval."""


def wilson_interval(successes: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a share; (0, 1) when n is 0."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)


def mean_interval(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, z: float = 1.959964
) -> tuple[float, float, float]:
    """Return mean, lower and upper end of its 95% normal interval; the interval is the mean for one value.

    Args:
        clusters: which values belong together, as responses to one prompt do; None takes all as independent. The
            standard error is then the cluster-robust one, sqrt(C / (C - 1) sum_c (sum_{i in c} (v_i - mean))^2) / n
            (Liang and Zeger 1986), which for clusters of one value is the ordinary s / sqrt(n).
    """
    n = len(values)
    if n == 0:
        return math.nan, math.nan, math.nan
    mean = math.fsum(values) / n
    half = z * _standard_error(values, clusters or range(n))
    return mean, mean - half, mean + half


def share_interval(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float, float]:
    """Return the mean of yes (1) and no (0) values and its Wilson interval for as many values as are independent.

    That number is n divided by the design effect (Kish 1965), the ratio of the cluster-robust variance to the ordinary
    one; where all values are equal it is the number of clusters.
    """
    n = len(values)
    share = math.fsum(values) / n
    ordinary, robust = (_standard_error(values, c) ** 2 for c in (range(n), clusters))
    independent = n / max(robust / ordinary, 1.0) if ordinary else len(set(clusters))
    return share, *wilson_interval(share * independent, independent)


def _standard_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    mean = math.fsum(values) / len(values)
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    if len(sums) == 1:
        return 0.0
    return math.sqrt(len(sums) / (len(sums) - 1) * math.fsum(x * x for x in sums.values())) / len(values)
