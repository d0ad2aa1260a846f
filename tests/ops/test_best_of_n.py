"""Best-of-n against brute force: every subset of the samples, every n-tuple of a known distribution."""

from __future__ import annotations

import itertools
import math
from statistics import fmean

import pytest
import torch

from rlhf_lightning.ops.best_of_n import best_of_n_kl_with_ties, best_of_n_means
from rlhf_lightning.ops.kl import best_of_n_kl


def over_all_subsets(scores: list[float], values: list[float], n: int) -> float:
    """The mean value of what is kept of every subset; of equal scores the mean."""
    kept = []
    for subset in itertools.combinations(range(len(scores)), n):
        top = max(scores[i] for i in subset)
        kept.append(fmean(values[i] for i in subset if scores[i] == top))
    return fmean(kept)


@pytest.mark.parametrize(
    "scores",
    [[0.3, -1.0, 2.5, 0.9, 1.1, -0.2], [1.0, 0.0, 1.0, 2.0, 0.0, 2.0], [0.0] * 6],
    ids=["no ties", "ties", "all tie"],
)
def test_means_are_those_over_all_subsets(scores: list[float]) -> None:
    values = [5.0, -2.0, 1.0, 7.0, 0.5, 3.0]
    found = best_of_n_means(torch.tensor(scores), torch.tensor([values, scores]))
    for n in range(1, 7):
        assert found[0, n - 1].item() == pytest.approx(over_all_subsets(scores, values, n), abs=1e-12), n
        assert found[1, n - 1].item() == pytest.approx(over_all_subsets(scores, scores, n), abs=1e-6), n
    torch.testing.assert_close(best_of_n_means(torch.tensor(scores), torch.tensor(values)), found[0])


def test_the_best_of_many_stays_exact() -> None:
    """C(512, 256) has no float: of ranks 1 to N the best of n has the mean n (N + 1) / (n + 1)."""
    size = 512
    ranks = torch.arange(1, size + 1.0).double()
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    found = best_of_n_means(ranks[order], ranks[order])
    expected = [n * (size + 1) / (n + 1) for n in range(1, size + 1)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def over_all_tuples(scores: list[float], n: int) -> float:
    """KL to the uniform reference of the policy that keeps the best of n draws, equal scores by chance."""
    size = len(scores)
    kept = [0.0] * size
    for drawn in itertools.product(range(size), repeat=n):
        best = [i for i in drawn if scores[i] == max(scores[j] for j in drawn)]
        for i in best:
            kept[i] += 1 / len(best) / size**n
    return sum(p * math.log(p * size) for p in kept if p)


@pytest.mark.parametrize("scores", [[0.1, 0.4, 0.2, 0.3], [0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 2.0]])
def test_kl_is_that_of_the_enumerated_policy(scores: list[float]) -> None:
    found = best_of_n_kl_with_ties(torch.tensor(scores))
    for n in range(1, 5):
        assert found[n - 1].item() == pytest.approx(over_all_tuples(scores, n), abs=1e-12), n
        assert found[n - 1].item() <= best_of_n_kl(n) + 1e-12


def test_kl_of_ten_equally_likely_responses() -> None:
    """Beirami et al. 2024 (arXiv 2401.01879): the bound holds, and ten responses stay below it."""
    found = best_of_n_kl_with_ties(torch.arange(100.0).div(10, rounding_mode="floor"))
    for n, expected in ((2, 0.189318), (4, 0.628825), (16, 1.733063), (64, 2.293451)):
        assert found[n - 1].item() == pytest.approx(expected, abs=1e-6)
    assert found[0].item() == 0.0
    equal = best_of_n_kl_with_ties(torch.zeros(5))
    assert equal.tolist() == [0.0] * 5  # a choice between equal scores is none
