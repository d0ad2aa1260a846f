"""Models of annotators find the reliabilities that labels were simulated with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.reliability import dawid_skene, noisy_bradley_terry
from rlhf_lightning.feedback.units import Entry


def entry(item: int, annotator: str, value: Any) -> Entry:
    return Entry((str(item), 0, 1), annotator, None, value, None, None)


def simulated(reliability: list[float], spread: float, size: int, seed: int) -> tuple[list[Entry], np.ndarray]:
    """Return votes of annotators by the Bradley-Terry model with noise, and the probability that the first is better."""
    rng = np.random.default_rng(seed)
    better = 1 / (1 + np.exp(-spread * rng.normal(size=size)))
    votes = [
        entry(item, f"w{k}", -1 if rng.random() < eta * p + (1 - eta) * (1 - p) else 1)
        for item, p in enumerate(better)
        for k, eta in enumerate(reliability)
    ]
    return votes, better


def test_bradley_terry_finds_planted_reliabilities() -> None:
    """A share of 600 votes has a standard error of 0.02, and the better response is not seen: three times that."""
    planted = [0.95, 0.9, 0.8, 0.65, 0.5]
    votes, better = simulated(planted, 2.0, 600, seed=0)
    fitted = noisy_bradley_terry(votes)
    assert list(fitted.annotators.values()) == pytest.approx(planted, abs=0.1)
    probability = np.array([fitted.posterior[str(i), 0, 1][-1] for i in range(len(better))])
    share = np.array([np.mean([v.value == -1 for v in votes[5 * i : 5 * i + 5]]) for i in range(len(better))])
    assert np.square(probability - better).mean() < 0.85 * np.square(share - better).mean()  # nearer than the votes


@pytest.mark.slow
def test_dawid_skene_finds_planted_error_rates() -> None:
    """Every item has a true answer; one annotator knows it, which a majority of four who mostly guess hides."""
    planted, rng = [0.9, 0.6, 0.6, 0.6, 0.6], np.random.default_rng(0)
    truth = rng.choice([-1, 1], size=400)
    votes = [
        entry(i, f"w{k}", t if rng.random() < p else -t) for i, t in enumerate(truth) for k, p in enumerate(planted)
    ]
    fitted = dawid_skene(votes)
    assert list(fitted.annotators.values()) == pytest.approx(planted, abs=0.1)
    probable = np.array([1 - 2 * (fitted.posterior[str(i), 0, 1][-1] > 0.5) for i in range(len(truth))])
    majority = np.array([np.sign(sum(v.value for v in votes[5 * i : 5 * i + 5])) for i in range(len(truth))])
    assert np.mean(probable == truth) > np.mean(majority == truth) + 0.05


def test_a_reliable_annotator_outvotes_two_who_guess() -> None:
    rng = np.random.default_rng(1)
    votes = [entry(i, name, t if good else int(rng.choice([-1, 1]))) for i, t in enumerate(rng.choice([-1, 1], 150))
             for name, good in (("a", True), ("b", True), ("c", True), ("x", False), ("y", False))]  # fmt: skip
    votes += [entry(1000, "a", -1), entry(1000, "x", 1), entry(1000, "y", 1)]
    for model in (dawid_skene, noisy_bradley_terry):
        assert model(votes).posterior["1000", 0, 1][-1] > 0.8


def test_ties_are_even() -> None:
    votes = [entry(i, name, 0) for i in range(20) for name in "ab"]
    assert noisy_bradley_terry(votes).posterior["3", 0, 1] == pytest.approx({-1: 0.5, 1: 0.5})


@pytest.mark.slow
def test_items_of_one_annotator_say_nothing_of_reliability() -> None:
    votes, _ = simulated([0.9, 0.9, 0.6], 2.0, 100, seed=2)
    alone = [entry(1000 + i, "w2", 1) for i in range(50)]
    for model in (dawid_skene, noisy_bradley_terry):
        assert model(votes + alone).annotators == pytest.approx(model(votes).annotators, abs=1e-4)
        with pytest.raises(UserError, match="no item was labeled by two annotators"):
            model(alone)
    stranger = [entry(2000, "new", -1)]
    for model in (dawid_skene, noisy_bradley_terry):
        assert "new" not in model(votes + stranger).annotators
        assert 0.5 < model(votes + stranger).posterior["2000", 0, 1][-1] < 1  # counted as one of the others
