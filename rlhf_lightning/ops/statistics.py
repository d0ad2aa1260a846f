"""95% intervals of means, shares and correlations, and a running standard deviation."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit
from scipy.stats import rankdata

Z = 1.959964
Interval = tuple[float, float, float]
"""Mean, and lower and upper end of its 95% interval; the ends are NaN where there is no interval."""


def finite(value: float) -> float | None:
    """Return a number, None where it is not finite: JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def as_metrics(name: str, value: Interval) -> dict[str, float]:
    """Return `name`, `name_low` and `name_high` as metrics.json has them, those that are finite."""
    return {key: x for key, x in zip((name, f"{name}_low", f"{name}_high"), value, strict=True) if math.isfinite(x)}


def as_columns(name: str, value: Interval) -> dict[str, float | None]:
    """Return the columns `name`, `low` and `high` of a row of a table, None where there is no interval."""
    return dict(zip((name, "low", "high"), map(finite, value), strict=True))


@dataclass
class RunningMoments:
    """Count, mean and sum of squared deviations of all values so far.

    Batches are merged by their own deviations (Chan, Golub and LeVeque 1979): the difference of sums of squares loses
    its digits where the mean is large.
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, count: float, mean: float, variance: float) -> None:
        """Add `count` values of this mean and biased variance."""
        if count:
            total, shift = self.count + count, mean - self.mean
            self.squares += count * variance + shift**2 * self.count * count / total
            self.mean += shift * count / total
            self.count = total

    @property
    def std(self) -> float:
        """The biased standard deviation; 0 before the first value."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


def wilson_interval(successes: float, n: float, z: float = Z) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a share; (0, 1) when n is 0."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # at a share of 0 or 1 rounding must not leave it outside
    return max(min((centre - spread) / scale, share), 0.0), min(max((centre + spread) / scale, share), 1.0)


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable] | None = None, level: float = 0.95) -> Interval:
    """Return mean, lower and upper end of its interval by Student's t with C - 1 degrees of freedom.

    C is the number of clusters; from a single one nothing is known about the error, and the ends are NaN.

    Args:
        clusters: which values belong together, as responses to one prompt do; None takes all as independent. The
            standard error is then the cluster-robust one, sqrt(C / (C - 1) sum_c (sum_{i in c} (v_i - mean))^2) / n
            (Liang and Zeger 1986), which for clusters of one value is the ordinary s / sqrt(n). Student's t instead
            of the normal distribution: Bell and McCaffrey 2002.
        level: the share of such intervals that contain what is estimated.
    """
    n = len(values)
    if n == 0:
        return math.nan, math.nan, math.nan
    mean = math.fsum(values) / n
    error, count = _standard_error(values, range(n) if clusters is None else clusters)
    half = _student(count, level) * error
    return mean, mean - half, mean + half


def share_interval(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Interval:
    """Return the mean of yes (1) and no (0) values and its Wilson interval for as many values as are independent.

    That number is n divided by the design effect (Kish 1965), the ratio of the cluster-robust variance to the ordinary
    one, and corrected for few clusters by the ratio of the quantiles of the normal distribution and Student's t
    (Korn and Graubard 1998); where all values are equal it is the number of clusters. Independent values need no
    correction. From a single cluster nothing is known about the error: the ends are NaN.
    """
    n = len(values)
    if n == 0:
        return math.nan, math.nan, math.nan
    share = math.fsum(values) / n
    if clusters is None or len(set(clusters)) == n > 1:
        return share, *wilson_interval(share * n, n)
    (ordinary, _), (robust, count) = _standard_error(values, range(n)), _standard_error(values, clusters)
    if count == 1:
        return share, math.nan, math.nan
    effect = (robust / ordinary) ** 2 if ordinary else n / count
    independent = n / max(effect, 1.0) * (Z / _student(count)) ** 2
    return share, *wilson_interval(share * independent, independent)


def correlation_interval(
    x: Sequence[float],
    y: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    kind: Literal["pearson", "spearman"] = "pearson",
) -> Interval:
    """Return the correlation of two columns with its 95% interval, which is symmetric on Fisher's scale atanh(r).

    The standard error is that of the mean of the influence function, z_x z_y - r (z_x^2 + z_y^2) / 2 for Pearson's
    correlation (Devlin, Gnanadesikan and Kettenring 1975), cluster-robust as in :func:`mean_interval`. Spearman's is
    that of the ranks; to their influence comes that a value moves the ranks of others (Croux and Dehon 2010). A column
    without variance has no correlation: NaN.
    """
    given = [np.asarray(x, float), np.asarray(y, float)]
    columns = [rankdata(c) / len(c) for c in given] if kind == "spearman" else given
    if len(x) < 3 or any(np.ptp(column) == 0 for column in columns):
        return math.nan, math.nan, math.nan
    u, v = ((column - column.mean()) / column.std() for column in columns)
    r = min(max(float((u * v).mean()), -1.0), 1.0)
    if abs(r) > 1 - 1e-12:  # the points are on a line
        return r, r, r
    if kind == "spearman":
        influence = u * v + _above(given[0], v) / columns[0].std() + _above(given[1], u) / columns[1].std()
        influence -= influence.mean()
    else:
        influence = u * v - r * (u**2 + v**2) / 2
    _, _, half = mean_interval(influence.tolist(), clusters)
    half /= 1 - r * r
    return r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def _above(values: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return for each of `values` (n,) the sum of `other` over the higher ones and half of the equal ones, over n."""
    _, place = np.unique(values, return_inverse=True)
    sums = np.bincount(place, other)
    return (sums[::-1].cumsum()[::-1] - sums / 2)[place] / len(values)


def _student(clusters: int, level: float = 0.95) -> float:
    """Return the quantile of Student's t for this many clusters: 97.5% for 95% intervals."""
    return float(stdtrit(clusters - 1, (1 + level) / 2)) if clusters > 1 else math.nan


def _standard_error(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, int]:
    """Return the cluster-robust standard error of the mean and the number of clusters."""
    mean = math.fsum(values) / len(values)
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    if len(sums) == 1:
        return 0.0, 1
    error = math.sqrt(len(sums) / (len(sums) - 1) * math.fsum(x * x for x in sums.values())) / len(values)
    return error, len(sums)
