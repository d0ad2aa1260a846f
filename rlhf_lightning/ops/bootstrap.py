"""A Bayesian bootstrap over clusters, for statistics that have no formula for their error."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.special import expit, logit, stdtrit

from rlhf_lightning.ops.statistics import Interval

RESAMPLES = 500


def bootstrap_weights(clusters: Sequence[Hashable], seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Return weights (1 + resamples, n) of n values: a row of ones, and one of the bootstrap per resample.

    The weights of a resample are independent standard exponential numbers, one per cluster (Rubin 1981). Unlike counts
    of drawn clusters none is 0, so that what can be estimated from all values can be from every resample.
    """
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    drawn = np.random.default_rng(seed).exponential(size=(resamples, len(places)))
    chosen = [places[cluster] for cluster in clusters]
    return np.concatenate([np.ones((1, len(chosen))), drawn[:, chosen]])


def bootstrap_interval(values: np.ndarray, clusters: int, share: bool = False) -> Interval:
    """Return the first value and its 95% interval by the standard deviation of the others, its resamples.

    The standard deviation is multiplied by sqrt((C + 1) / (C - 1)), which for a mean gives the ordinary standard error,
    and by Student's t with C - 1 degrees of freedom, as in :func:`rlhf_lightning.ops.statistics.mean_interval`.

    Args:
        values: (1 + resamples,) of the rows of :func:`bootstrap_weights`.
        clusters: C; from a single one nothing is known about the error, and the ends are NaN.
        share: the interval is computed on the scale of log-odds, so that it stays in (0, 1); a value of 0 or 1, or one
            that no resample changes, has none.
    """
    value = float(values[0])
    if clusters < 2 or (share and (not 0 < value < 1 or float(np.ptp(values)) < 1e-9)):
        return value, math.nan, math.nan
    scaled = logit(values) if share else values
    half = stdtrit(clusters - 1, 0.975) * math.sqrt((clusters + 1) / (clusters - 1)) * float(np.std(scaled[1:]))
    low, high = float(scaled[0]) - half, float(scaled[0]) + half
    return (value, float(expit(low)), float(expit(high))) if share else (value, low, high)
