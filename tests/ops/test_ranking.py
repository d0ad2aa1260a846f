"""Bradley-Terry and Plackett-Luce: known probabilities, ties, margins, invariances, planted scores."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_lightning.ops.ranking import (
    bradley_terry,
    centering,
    pairwise_ranking,
    plackett_luce,
    ranked_pairs,
    text_ranks,
)

ranking = st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3)), min_size=1, max_size=5)
rankings = st.lists(ranking, min_size=1, max_size=4)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def flatten(groups: list[list[tuple[float, int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, ranks and group_of of lists of (score, rank)."""
    group_of = torch.tensor([g for g, group in enumerate(groups) for _ in group])
    scores = f64(*[score for group in groups for score, _ in group])
    return scores, torch.tensor([rank for group in groups for _, rank in group]), group_of


def test_bradley_terry_by_hand() -> None:
    loss = bradley_terry(f64(1, 0, 2, 1), f64(0, 0, 0, 0), f64(0, 0, 3, 0), f64(1, 1, 1, 0.25))
    expected = [
        -math.log(0.7310585786300049),
        math.log(2),
        softplus(1),
        0.25 * softplus(-1) + 0.75 * softplus(1),
    ]
    torch.testing.assert_close(loss, f64(*expected), rtol=1e-13, atol=0)


def test_margin_asks_for_a_larger_gap_whichever_response_is_preferred() -> None:
    flat = bradley_terry(f64(0.7), f64(0.2), 1.5, 0.0)
    torch.testing.assert_close(flat, f64(softplus(0.5 + 1.5)))
    torch.testing.assert_close(flat, bradley_terry(f64(0.2), f64(0.7), 1.5, 1.0))


def test_equal_texts_share_a_rank() -> None:
    assert text_ranks(["a", "b", "a ", "c", "d"], [1.0, 3.0, 9.0, 3.0, 0.5]) == [1, 0, 1, 0, 2]


def test_bradley_terry_gradient() -> None:
    chosen, rejected = f64(1.0).requires_grad_(), f64(0.5).requires_grad_()
    bradley_terry(chosen, rejected, margin=0.25).backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-1 / (1 + math.exp(0.25)), abs=1e-15)
    assert rejected.grad.item() == -chosen.grad.item()


@settings(max_examples=60, deadline=None)
@given(rankings)
def test_pairwise_equals_a_loop(groups: list[list[tuple[float, int]]]) -> None:
    scores, ranks, group_of = flatten(groups)
    margins = torch.linspace(0, 1, len(groups), dtype=torch.float64)
    labels = torch.linspace(1, 0.7, len(groups), dtype=torch.float64)
    losses, gaps = pairwise_ranking(scores, ranks, group_of, margins, labels)
    expected, all_gaps = [], []
    for group, margin, label in zip(groups, margins.tolist(), labels.tolist(), strict=True):
        found = [a - b for (a, i), (b, j) in itertools.product(group, repeat=2) if i < j]
        terms = [label * softplus(margin - gap) + (1 - label) * softplus(margin + gap) for gap in found]
        expected.append(math.fsum(terms) / max(len(terms), 1))
        all_gaps += found
    torch.testing.assert_close(losses, f64(*expected), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gaps, f64(*all_gaps))
    first, second = ranked_pairs(ranks, group_of)
    assert (ranks[first] < ranks[second]).all()
    assert torch.equal(group_of[first], group_of[second])


@settings(max_examples=60, deadline=None)
@given(rankings)
def test_plackett_luce_equals_a_loop(groups: list[list[tuple[float, int]]]) -> None:
    scores, ranks, group_of = flatten(groups)
    expected = []
    for group in groups:
        worst = max(rank for _, rank in group)
        terms = [
            math.log(math.fsum(math.exp(s) for s, r in group if r >= rank)) - score
            for score, rank in group
            if rank < worst
        ]
        expected.append(math.fsum(terms))
    torch.testing.assert_close(plackett_luce(scores, ranks, group_of, len(groups)), f64(*expected))


def test_plackett_luce_published_value() -> None:
    loss = plackett_luce(f64(1, 0, -1), torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.long), 1)
    assert math.exp(-loss.item()) == pytest.approx(0.486330, abs=5e-7)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_plackett_luce_is_a_distribution_over_orderings(k: int) -> None:
    scores = torch.linspace(-1.5, 2, k, dtype=torch.float64)
    group_of = torch.zeros(k, dtype=torch.long)
    orderings = itertools.permutations(range(k))
    total = sum(plackett_luce(scores, torch.tensor(order), group_of, 1).neg().exp().item() for order in orderings)
    assert total == pytest.approx(1.0, abs=1e-12)


def test_pairs_are_the_case_of_two() -> None:
    scores, ranks, group_of = f64(0.3, 1.1, 2.0, -1.0), torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1])
    pairwise, _ = pairwise_ranking(scores, ranks, group_of, torch.zeros(2), torch.ones(2))
    torch.testing.assert_close(pairwise, f64(softplus(0.8), softplus(3.0)))
    torch.testing.assert_close(plackett_luce(scores, ranks, group_of, 2), pairwise)


def test_a_group_of_ties_gives_neither_loss_nor_gradient() -> None:
    scores = f64(1.0, -2.0, 0.5).requires_grad_()
    ranks, group_of = torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long)
    pairwise, gaps = pairwise_ranking(scores, ranks, group_of, torch.zeros(1), torch.ones(1))
    loss = pairwise.sum() + plackett_luce(scores, ranks, group_of, 1).sum()
    loss.backward()
    assert loss.item() == 0
    assert gaps.shape == (0,)
    assert scores.grad is not None
    assert not scores.grad.any()


@settings(max_examples=40, deadline=None)
@given(rankings, st.floats(-50, 50), st.randoms(use_true_random=False))
def test_losses_ignore_a_shift_within_a_prompt_the_order_of_rows_and_other_groups(
    groups: list[list[tuple[float, int]]], shift: float, random: object
) -> None:
    count = len(groups)
    scores, ranks, group_of = flatten(groups)
    shifts = shift * torch.arange(1, count + 1, dtype=torch.float64)
    order = list(range(len(scores)))
    random.shuffle(order)  # type: ignore[attr-defined]
    zeros, ones = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
    moved = (scores + shifts[group_of])[order], ranks[order], group_of[order]
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    plain = pairwise_ranking(scores, ranks, group_of, zeros, ones)[0]
    close(pairwise_ranking(*moved, zeros, ones)[0], plain)
    close(plackett_luce(*moved, count), plackett_luce(scores, ranks, group_of, count))
    alone = [pairwise_ranking(*flatten([group]), zeros[:1], ones[:1])[0] for group in groups]
    close(torch.cat(alone), plain)


def test_centering_of_pairs_and_groups() -> None:
    scores = f64(1.0, 3.0, -2.0, 2.0, 5.0).requires_grad_()
    loss = centering(scores, torch.tensor([0, 0, 1, 1, 1]), 2)
    torch.testing.assert_close(
        loss, f64(16.0, (2 * 5 / 3) ** 2)
    )  # the second is the same for any number of responses of that mean
    loss.sum().backward()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, f64(8, 8, *[2 * (2 * 5 / 3) * 2 / 3] * 3))


def test_planted_scores_are_recovered_from_infinite_preferences() -> None:
    """With soft labels P(i over j) = sigma(s_i - s_j) over all pairs the minimum is at s, up to a shift."""
    planted = f64(0.8, -0.4, 0.1, -0.5)
    pairs = torch.combinations(torch.arange(4))
    labels = torch.sigmoid(planted[pairs[:, 0]] - planted[pairs[:, 1]])
    scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bradley_terry(scores[pairs[:, 0]], scores[pairs[:, 1]], label=labels).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    torch.testing.assert_close(scores.detach() - scores.detach().mean(), planted - planted.mean(), rtol=0, atol=1e-8)
