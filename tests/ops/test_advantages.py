"""Advantages and whitening against double loops, hand values and the statistics of the pooled ranks."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_lightning.ops.advantages import discounted_returns, explained_variance, gae, grpo, rloo, whiten

lengths_of_rows = st.lists(st.integers(0, 6), min_size=1, max_size=5)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def problem(lengths: list[int], extra: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return rewards, values and mask; the padding holds values that must not be read."""
    rng = torch.Generator().manual_seed(sum(i * n for i, n in enumerate(lengths, 1)))
    mask = torch.arange(max(lengths) + extra)[None, :] < torch.tensor(lengths)[:, None]
    rewards, values = torch.full(mask.shape, 1e6).double(), torch.full(mask.shape, -1e6).double()
    rewards[mask] = torch.randn(sum(lengths), generator=rng, dtype=torch.float64)
    values[mask] = torch.randn(sum(lengths), generator=rng, dtype=torch.float64)
    return rewards, values, mask


@pytest.mark.parametrize(
    ("lam", "expected"),
    [(0.95, (0.40065, 0.527, 0.66, 0.8)), (1.0, (0.5, 0.6, 0.7, 0.8)), (0.0, (-0.1, -0.1, -0.1, 0.8))],
)
def test_gae_by_hand(lam: float, expected: tuple[float, ...]) -> None:
    rewards, values = f64(0, 0, 0, 1)[None], f64(0.5, 0.4, 0.3, 0.2)[None]
    advantages, returns = gae(rewards, values, torch.ones(1, 4, dtype=torch.bool), 1.0, lam)
    torch.testing.assert_close(advantages[0], f64(*expected), rtol=0, atol=1e-14)
    torch.testing.assert_close(returns, advantages + values, rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(lengths_of_rows, st.floats(0, 1), st.floats(0, 1), st.integers(0, 3))
def test_gae_is_the_double_sum(lengths: list[int], gamma: float, lam: float, extra: int) -> None:
    rewards, values, mask = problem(lengths, extra)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    expected = torch.zeros_like(rewards)
    for s, n in enumerate(lengths):
        v = [*values[s, :n].tolist(), 0.0]
        deltas = [rewards[s, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected[s, t] = sum((gamma * lam) ** step * delta for step, delta in enumerate(deltas[t:]))
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, (expected + values) * mask, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(lengths_of_rows, st.integers(0, 4))
def test_padding_and_the_order_of_rows_change_nothing(lengths: list[int], extra: int) -> None:
    rewards, values, mask = problem(lengths)
    advantages, returns = gae(rewards, values, mask, 0.9, 0.8)
    wide, wide_returns = gae(*problem(lengths, extra), 0.9, 0.8)
    assert torch.equal(wide[:, : mask.shape[1]], advantages)
    assert torch.equal(wide_returns[:, : mask.shape[1]], returns)
    assert not wide[:, mask.shape[1] :].any()
    flipped, _ = gae(rewards.flip(0), values.flip(0), mask.flip(0), 0.9, 0.8)
    assert torch.equal(flipped.flip(0), advantages)


def test_exact_values_leave_no_advantage() -> None:
    """With V_t the discounted return itself every TD error is 0, for any lambda."""
    rewards, _, mask = problem([4, 2])
    values = discounted_returns(rewards, mask, 0.7)
    for lam in (0.0, 0.5, 1.0):
        advantages, returns = gae(rewards, values, mask, 0.7, lam)
        torch.testing.assert_close(advantages, torch.zeros_like(advantages), rtol=0, atol=1e-14)
        torch.testing.assert_close(returns, values)


def test_discounted_returns_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert discounted_returns(rewards, mask, 0.5).tolist() == [[3.0, 4.0, 4.0], [1.5, 1.0, 0.0]]


# ---- whitening --------------------------------------------------------------------------------


def test_whitening_uses_the_biased_variance_of_the_masked_values() -> None:
    values = torch.tensor([[1.0, 2.0, 1e6], [6.0, -1e6, 1e6]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    mean, std = statistics.fmean([1, 2, 6]), statistics.pstdev([1, 2, 6])
    expected = torch.zeros_like(values)
    expected[mask] = (f64(1, 2, 6) - mean) / std
    torch.testing.assert_close(whiten(values, mask), expected, rtol=1e-8, atol=0)
    expected[mask] += mean
    torch.testing.assert_close(whiten(values, mask, shift_mean=False), expected, rtol=1e-8, atol=0)


@settings(max_examples=40, deadline=None)
@given(lengths_of_rows.filter(lambda n: sum(n) > 2), st.floats(0.1, 50), st.floats(-1e3, 1e3))
def test_whitened_values_have_mean_0_and_variance_1_at_any_shift_and_scale(
    lengths: list[int], scale: float, shift: float
) -> None:
    values, _, mask = problem(lengths)
    found = whiten(values * scale + shift, mask)
    picked = found[mask]
    variance = (values[mask] * scale).var(correction=0).item()
    share = variance / (variance + 1e-8)  # the 1e-8 under the root is felt where the values are nearly equal
    assert abs(picked.mean().item()) < 1e-9
    assert picked.var(correction=0).item() == pytest.approx(share, rel=1e-6)
    assert not found[~mask].any()
    centred = (values[mask] - values[mask].mean()) * scale / variance**0.5
    torch.testing.assert_close(picked, centred * share**0.5, rtol=1e-6, atol=1e-6)


def test_a_large_mean_does_not_eat_the_digits() -> None:
    """In float32 E[x^2] - E[x]^2 of these values is 0 or negative."""
    values, mask = torch.tensor([[10_000.0, 10_001.0, 10_002.0]]), torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(whiten(values, mask), torch.tensor([[-1.0, 0.0, 1.0]]) * 1.5**0.5)


def test_equal_values_and_empty_masks_give_zeros() -> None:
    values = torch.full((2, 3), 5.0)
    assert not whiten(values, torch.ones(2, 3, dtype=torch.bool)).any()
    assert not whiten(values, torch.zeros(2, 3, dtype=torch.bool)).any()


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_ranks_share_one_mean_and_variance(cut: int, shift_mean: bool) -> None:
    """Two ranks in turn, each all-reduce replayed from the partial sums of both; a rank may hold nothing."""
    values, _, mask = problem([3, 5, 1])
    shards = [(values[:cut], mask[:cut]), (values[cut:], mask[cut:])]
    sums: list[Tensor] = []
    for _ in range(2):  # one pass for each of the two reductions: a rank needs the first sum to make its second
        partials = []
        for shard, shard_mask in shards:
            calls = itertools.count()

            def record(partial: Tensor, calls: itertools.count[int] = calls, into: list[Tensor] = partials) -> Tensor:
                call = next(calls)
                if call == len(sums):
                    into.append(partial)
                return sums[call] if call < len(sums) else partial

            whiten(shard, shard_mask, shift_mean, record)
        sums.append(torch.stack(partials).sum(0))
    found = []
    for shard, shard_mask in shards:
        replay = iter(sums)
        found.append(whiten(shard, shard_mask, shift_mean, lambda _, replay=replay: next(replay)))
        assert next(replay, None) is None  # every rank makes the same number of collective calls
    torch.testing.assert_close(torch.cat(found), whiten(values, mask, shift_mean), rtol=1e-12, atol=1e-12)


# ---- groups of samples ------------------------------------------------------------------------


def test_rloo_leaves_one_out() -> None:
    scores = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    expected = torch.tensor([[1 - 4, 2 - 3.5, 6 - 1.5], [-1.5, -1.5, 3]], dtype=torch.float64)
    torch.testing.assert_close(rloo(scores), expected, rtol=0, atol=1e-14)


def test_grpo_standardizes_within_the_prompt() -> None:
    scores = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]], dtype=torch.float64)
    found = grpo(scores)
    torch.testing.assert_close(found[0], f64(-2, -1, 3) / (statistics.stdev([1, 2, 6]) + 1e-4))
    assert not found[1].any()  # equal rewards teach nothing and divide by nothing
    assert torch.equal(grpo(scores, scale=False)[0], f64(-2, -1, 3))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.floats(-9, 9), min_size=4, max_size=4), min_size=1, max_size=3),
    st.floats(-5, 5),
    st.floats(0.5, 4),
)
def test_group_advantages_ignore_a_shift_and_sum_to_zero(rows: list[list[float]], shift: float, scale: float) -> None:
    scores = torch.tensor(rows, dtype=torch.float64)
    for advantage in (rloo, grpo, lambda x: grpo(x, scale=False)):
        found = advantage(scores)
        torch.testing.assert_close(advantage(scores + shift), found, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found.sum(1), torch.zeros(len(rows), dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(rloo(scores * scale), rloo(scores) * scale, rtol=1e-9, atol=1e-9)


def test_explained_variance() -> None:
    returns, mask = f64(1, 2, 3, 1e9)[None], torch.tensor([[True, True, True, False]])
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(torch.zeros_like(returns), returns, mask).item() == 0.0
    assert explained_variance(f64(5, 6, 7, 0)[None], returns, mask).item() == 1.0  # a constant error is not variance
    assert explained_variance(f64(1.5, 2, 2.5, 0)[None], returns, mask).item() == pytest.approx(0.75)
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones_like(returns), mask).item() == 0.0
