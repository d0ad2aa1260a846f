"""How reliable each annotator is, from their labels alone, and what the labels say once that is known."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.special import expit

from rlhf_lightning.errors import UserError, needs
from rlhf_lightning.feedback.units import Entry, Table, table

HONEST, NOISY = 2.0, 0.5
"""Pseudo-counts of the prior on an annotator's reliability, which is 0.8 where nothing is known."""
FLOOR = 1e-10
NARROWEST = 0.05
"""Least standard deviation of the differences of scores: where all labels are ties."""


@dataclass(frozen=True)
class Reliability:
    """A fitted model of annotators.

    Args:
        annotators: annotator -> probability that they say what is the case, see the function that fitted it; nothing
            is known of those who share no unit with others.
        posterior: unit -> category -> probability; of a pair -1 is the first response better, 0 a tie, 1 the second.
    """

    annotators: dict[str, float]
    posterior: dict[tuple[Any, ...], dict[Any, float]]


def dawid_skene(entries: Sequence[Entry], iterations: int = 100) -> Reliability:
    """Fit a confusion matrix per annotator by EM (Dawid and Skene 1979; crowd-kit's implementation).

    The reliability is the probability of the right category, averaged over the true ones by their frequency.
    """
    crowdkit, pandas = needs("crowdkit.aggregation", "agreement"), needs("pandas", "agreement")
    data = table(entries)
    several = shared(data)
    frame = pandas.DataFrame({"task": data.unit, "worker": data.annotator, "label": data.value})[several]
    size = len(data.categories)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # crowd-kit calls pandas in ways that are to change
        model = crowdkit.DawidSkene(n_iter=iterations).fit(frame)
    priors = model.priors_.reindex(range(size), fill_value=0.0).to_numpy()
    index = pandas.MultiIndex.from_product([range(len(data.annotators)), range(size)])
    errors = model.errors_.reindex(index=index, columns=range(size)).to_numpy().reshape(-1, size, size)  # label, truth
    known = ~np.isnan(errors).all(axis=(1, 2))
    errors = np.nan_to_num(errors)
    errors[~known] = errors[known].mean(axis=0)  # of an annotator who shares no unit
    accuracy = np.einsum("kcc,c->k", errors, priors)
    weights = np.tile(np.log(priors + FLOOR), (len(data.units), 1))
    np.add.at(weights, data.unit, np.log(errors[data.annotator, data.value] + FLOOR))
    posterior = normalized(weights)
    return Reliability(
        {name: float(accuracy[k]) for k, name in enumerate(data.annotators) if known[k]},
        {
            unit: dict(zip(data.categories, map(float, row), strict=True))
            for unit, row in zip(data.units, posterior, strict=True)
        },
    )


def shared(data: Table) -> np.ndarray:
    """Return (N,) which labels are of units that several annotators labeled: others say nothing of an annotator.

    Raises:
        UserError: there are none.
    """
    several = np.bincount(data.unit, minlength=len(data.units))[data.unit] > 1
    if not several.any():
        raise UserError("no item was labeled by two annotators, so nothing says how reliable they are")
    return several


def normalized(weights: np.ndarray) -> np.ndarray:
    """Return the rows of log weights as probabilities."""
    weights = np.exp(weights - weights.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def noisy_bradley_terry(entries: Sequence[Entry], iterations: int = 500, tolerance: float = 1e-5) -> Reliability:
    """Fit a Bradley-Terry model with annotator noise by EM.

    An annotator k says that the first response is better with probability eta_k sigma(d) + (1 - eta_k) sigma(-d), where
    d is the difference of the two scores and eta_k the reliability (Chen et al. 2013, Crowd-BT); a tie is half a vote
    for each. Differences are normal with mean 0, and are integrated out on a grid with their variance estimated:
    as many free scores as there are pairs would fit the noise. With fewer than three annotators per pair, reliability
    and variance can hardly be told apart, and the prior decides much.
    """
    data = table(entries)
    if set(data.categories) - {-1, 0, 1}:
        raise UserError("aggregate.reliability=bradley_terry is for comparisons; labels of items have dawid_skene")
    several = shared(data)
    shape = (len(data.units), len(data.annotators))
    share = 0.5 - 0.5 * np.array(data.categories)[data.value]  # (N,) of each vote that is for the first response
    places = (data.unit, data.annotator)
    first, second = csr_array((share, places), shape), csr_array((1 - share, places), shape)
    used = np.unique(data.unit[several])
    votes = np.bincount(data.annotator[several], minlength=shape[1])
    grid = np.linspace(-8.0, 8.0, 65)
    up, eta, spread = expit(grid), np.full((shape[1], 1), HONEST / (HONEST + NOISY)), 2.0
    for step in range(iterations + 1):
        says_first = eta * up + (1 - eta) * (1 - up)  # (A, G)
        says_second = 1 - says_first
        weights = normalized(first @ np.log(says_first) + second @ np.log(says_second) - 0.5 * (grid / spread) ** 2)
        if step == iterations:
            break
        known = weights[used]  # (U, G) posterior of the difference
        honest = eta * (up / says_first * (first[used].T @ known) + (1 - up) / says_second * (second[used].T @ known))
        updated = (honest.sum(axis=1) + HONEST) / (votes + HONEST + NOISY)
        spread = max(float(np.sqrt((known @ grid**2).mean())), NARROWEST)
        change, eta = float(np.abs(updated - eta[:, 0]).max()), updated[:, None]
        if change < tolerance:
            break
    better = weights @ expit(grid)
    posterior = {unit: {-1: float(p), 1: float(1 - p)} for unit, p in zip(data.units, better, strict=True)}
    return Reliability({name: float(eta[k, 0]) for k, name in enumerate(data.annotators) if votes[k]}, posterior)


MODELS = {"dawid_skene": dawid_skene, "bradley_terry": noisy_bradley_terry}
