"""Token log-probabilities against a loop, chunked against whole, and the reductions over responses."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rlhf_lightning.ops.logprobs import sequence_sum, token_logprobs

VOCABULARY = 7


def problem(n: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Linear, Tensor]:
    """Return states that ask for a gradient, a head and targets."""
    rng = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, 5, generator=rng, dtype=dtype).requires_grad_()
    head = nn.Linear(5, VOCABULARY, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, 5, generator=rng, dtype=dtype))
        head.bias.copy_(torch.randn(VOCABULARY, generator=rng, dtype=dtype))
    return hidden, head, torch.randint(0, VOCABULARY, (n,), generator=rng)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_logprobs_and_entropy_equal_a_loop(temperature: float) -> None:
    hidden, head, targets = problem()
    logprobs, entropy = token_logprobs(hidden, head, targets, temperature, entropy=True)
    assert entropy is not None
    for i, row in enumerate(head(hidden).tolist()):
        weights = [math.exp(v / temperature) for v in row]
        shares = [w / math.fsum(weights) for w in weights]
        assert logprobs[i].item() == pytest.approx(math.log(shares[targets[i]]), abs=1e-13)
        assert entropy[i].item() == pytest.approx(-math.fsum(p * math.log(p) for p in shares), abs=1e-13)


def test_entropy_is_only_computed_when_asked() -> None:
    hidden, head, targets = problem()
    assert token_logprobs(hidden, head, targets)[1] is None


def test_uniform_logits_have_the_logarithm_of_the_vocabulary() -> None:
    hidden, _, targets = problem()
    logprobs, entropy = token_logprobs(hidden, lambda h: h.new_zeros(len(h), VOCABULARY), targets, 0.3, entropy=True)
    assert entropy is not None
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -math.log(VOCABULARY)))
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(VOCABULARY)))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_gradients_are_those_of_finite_differences(
    rows: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the logits are read in several blocks."""
    monkeypatch.setattr("rlhf_lightning.ops.logprobs.BLOCK", rows * VOCABULARY)
    hidden, head, targets = problem()

    def both(states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        found, entropy = token_logprobs(states, lambda h: h @ weight.T, targets, temperature, entropy=True)
        assert entropy is not None
        return found, entropy

    assert torch.autograd.gradcheck(both, (hidden, head.weight))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 10, 11, 100])
def test_chunks_do_not_change_values_or_gradients(rows: int, entropy: bool) -> None:
    def run(max_logits: int) -> list[Tensor]:
        hidden, head, targets = problem()
        logprobs, entropies = token_logprobs(hidden, head, targets, 0.8, entropy, max_logits)
        weights = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
        loss = (weights * logprobs).sum()
        if entropies is not None:
            loss = loss + (weights.flip(0) * entropies).sum()
        loss.backward()
        assert hidden.grad is not None
        assert head.weight.grad is not None
        assert head.bias.grad is not None
        found = [logprobs.detach(), hidden.grad, head.weight.grad, head.bias.grad]
        return found if entropies is None else [*found, entropies.detach()]

    for chunked, whole in zip(run(rows * VOCABULARY), run(2**27), strict=True):
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", ["neither", "hidden", "head"])
def test_logits_never_exceed_the_limit(frozen: str) -> None:
    """Also not in what autograd keeps, whichever part learns."""
    hidden, head, targets = problem(n=60)
    hidden.requires_grad_(frozen != "hidden")
    head.requires_grad_(frozen != "head")
    largest, saved = 0, 0

    def counted(states: Tensor) -> Tensor:
        nonlocal largest
        logits = head(states)
        largest = max(largest, logits.numel())
        return logits

    def save(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.numel() if tensor.ndim == 2 and tensor.shape[-1] == VOCABULARY else 0
        return tensor

    limit = 6 * VOCABULARY
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        logprobs, _ = token_logprobs(hidden, counted, targets, max_logits=limit)
    assert largest == limit
    assert saved == 0
    logprobs.sum().backward()
    assert largest == limit


def test_no_gradient_no_recomputation() -> None:
    hidden, head, targets = problem(n=9)
    calls: list[int] = []
    with torch.no_grad():
        token_logprobs(hidden, lambda h: (calls.append(len(h)), head(h))[1], targets, max_logits=3 * VOCABULARY)
    assert calls == [1, 3, 3, 3]  # the first call only asks for the size of the vocabulary


def test_gradients_of_half_precision_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the plain formula, whose rounding is that of the last cast to bfloat16."""
    monkeypatch.setattr("rlhf_lightning.ops.logprobs.BLOCK", 4 * VOCABULARY)
    rng = torch.Generator().manual_seed(5)
    logits = (4 * torch.randn(11, VOCABULARY, generator=rng)).bfloat16().requires_grad_()
    targets = torch.randint(0, VOCABULARY, (11,), generator=rng)
    weights = torch.linspace(-1, 2, 11)
    plain = torch.log_softmax(logits.float() / 0.7, -1).gather(-1, targets[:, None]).squeeze(-1)
    (expected,) = torch.autograd.grad((weights * plain).sum(), logits)
    found, _ = token_logprobs(logits, lambda h: h, targets, 0.7)
    (gradient,) = torch.autograd.grad((weights * found).sum(), logits)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, expected, rtol=2**-8, atol=1e-6)


def test_half_precision_is_widened_before_the_softmax() -> None:
    hidden, head, targets = problem(dtype=torch.bfloat16)
    logprobs, _ = token_logprobs(hidden, head, targets)
    assert logprobs.dtype == torch.float32
    exact = torch.log_softmax(head(hidden).double(), -1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs.double(), exact, rtol=0, atol=1e-6)


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, 0.0], [-1e4, 0.0]])
    logprobs, entropy = token_logprobs(logits, lambda h: h, torch.tensor([0, 0]), entropy=True)
    assert logprobs.tolist() == [0.0, -1e4]
    assert entropy is not None
    assert entropy.tolist() == [0.0, 0.0]


def test_no_tokens() -> None:
    hidden, head, _ = problem()
    logprobs, entropy = token_logprobs(hidden[:0], head, torch.zeros(0, dtype=torch.long), entropy=True, max_logits=1)
    assert logprobs.shape == (0,)
    assert entropy is not None
    assert entropy.shape == (0,)


def test_sums_over_sequences() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    assert sequence_sum(values, torch.tensor([0, 0, 2, 0]), 4).tolist() == [11.0, 0.0, 4.0, 0.0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=6), st.randoms(use_true_random=False))
def test_sums_ignore_the_order_of_tokens(lengths: list[int], random: Random) -> None:
    flat = torch.randn(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(sum(lengths)))
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    order = random.sample(range(len(flat)), len(flat))
    expected = [part.sum().item() for part in flat.split(lengths)] if lengths else []
    assert sequence_sum(flat[order], ids[order], len(lengths)).tolist() == pytest.approx(expected)
