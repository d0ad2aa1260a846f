"""Making a judge's probabilities mean what they say, by labels of people."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

SUREST = 1e-3
"""No probability is taken to be nearer to 0 or 1: a judge that writes verdicts says just these."""
BINS = 10


def fit_temperature(probabilities: Sequence[float], labels: Sequence[float]) -> float:
    """Return the temperature T that minimizes the negative log-likelihood of labels under sigmoid(logit(p) / T).

    Both orders of a pair say the same, so there is no intercept, which Platt's scaling has beside the slope 1 / T.
    Infinity is the answer where the judge knows nothing: every probability is then 0.5 (Guo et al. 2017).

    Args:
        probabilities: that the first response of each pair is better.
        labels: 1.0 where people prefer the first, 0.0 where the second, or the share who prefer the first.
    """
    scores, target = logit(np.clip(probabilities, SUREST, 1 - SUREST)), np.asarray(labels, float)

    def loss(slope: float) -> float:
        return float(np.mean(np.logaddexp(0.0, slope * scores) - target * slope * scores))

    if np.mean((target - 0.5) * scores) <= 0:  # the derivative at 0; the loss is convex
        return math.inf
    return 1.0 / minimize_scalar(loss, bounds=(1e-6, 100.0), method="bounded", options={"xatol": 1e-6}).x


def calibrated(probability: float, temperature: float) -> float:
    """Return a probability at a temperature."""
    return float(expit(logit(min(max(probability, SUREST), 1 - SUREST)) / temperature))


def cross_fitted(probabilities: Sequence[float], labels: Sequence[float], clusters: Sequence[Hashable]) -> list[float]:
    """Return each probability at the temperature of the other half of the clusters, to measure calibration by.

    With one cluster there is no other half, and they are returned as they are.
    """
    halves = {cluster: number % 2 for number, cluster in enumerate(dict.fromkeys(clusters))}
    if len(halves) < 2:
        return list(probabilities)
    temperatures = []
    for half in (0, 1):
        other = [i for i, cluster in enumerate(clusters) if halves[cluster] != half]
        temperatures.append(fit_temperature([probabilities[i] for i in other], [labels[i] for i in other]))
    return [calibrated(p, temperatures[halves[c]]) for p, c in zip(probabilities, clusters, strict=True)]


def calibration_error(probabilities: Sequence[float], labels: Sequence[float]) -> float:
    """Return the expected calibration error of the preferred response: |mean confidence - accuracy| over ten bins."""
    p, target = np.asarray(probabilities, float), np.asarray(labels, float)
    confidence = np.maximum(p, 1 - p)
    right = np.where(p == 0.5, 0.5, np.where(p > 0.5, target, 1 - target))
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(float((confidence[bins == b] - right[bins == b]).sum())) for b in set(bins.tolist())]
    return sum(gaps) / len(p)
