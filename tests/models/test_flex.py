"""FlexAttention over packed groups: its block mask is the group rule, its outputs and gradients are those in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from rlhf_lightning.models import flex as module
from rlhf_lightning.models.attention import group_sdpa, runs_mask
from rlhf_lightning.models.flex import block_mask, padded_length
from rlhf_lightning.ops.groups import Group, pack
from rlhf_lightning.ops.masking import group_attention_mask
from rlhf_lightning.ops.runs import Runs
from tests.helpers.plain import flex_on_cpu

tokens = st.lists(st.integers(3, 63), min_size=1, max_size=7)
some_groups = st.lists(st.builds(Group, tokens, st.lists(tokens, min_size=1, max_size=4)), min_size=1, max_size=5)


@pytest.fixture
def on_cpu() -> Iterator[None]:
    with flex_on_cpu():
        yield


def one_row(groups: list[Group], row_tokens: int, length: int) -> tuple[Runs, list[Tensor]]:
    """Return the runs of a batch, and group, response and position (1, length) of its tokens and of padding."""
    batch = pack(groups, row_tokens)
    runs = batch.runs
    assert runs is not None
    columns = []
    for column, fill in ((batch.group_ids, -1), (batch.response_ids, 0), (batch.position_ids, 0)):
        row = column.new_full((1, length), fill)
        row[0, : len(runs.real)] = column.flatten()[runs.real]
        columns.append(row)
    padding = length - len(runs.real)
    columns[2][0, len(runs.real) :] = torch.arange(padding)
    return runs, columns


@given(some_groups, st.integers(1, 60), st.sampled_from([None, 1, 2, 3, 5, 9, 30]))
@settings(max_examples=60, deadline=None)
def test_the_block_mask_is_the_group_rule(groups: list[Group], row_tokens: int, window: int | None) -> None:
    """In blocks of 4 tokens: every pair, and which blocks are empty, full or neither."""
    total = sum(group.tokens for group in groups)
    length = -(-total // 4) * 4
    runs, (group, response, position) = one_row(groups, row_tokens, length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 4)
        found = block_mask(runs, window)
    assert found.shape == (1, 1, length, length)
    expected = group_attention_mask(group, response, position, window)[0, 0]
    q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
    assert torch.equal(found.mask_mod(torch.tensor(0), torch.tensor(0), q, k), expected)
    allowed = expected.view(length // 4, 4, length // 4, 4).sum((1, 3))
    parts = {
        "kv": (found.kv_num_blocks, found.kv_indices, (allowed > 0) & (allowed < 16)),
        "full_kv": (found.full_kv_num_blocks, found.full_kv_indices, allowed == 16),
        "q": (found.q_num_blocks, found.q_indices, ((allowed > 0) & (allowed < 16)).T),
        "full_q": (found.full_q_num_blocks, found.full_q_indices, (allowed == 16).T),
    }
    for name, (counts, indices, blocks) in parts.items():
        assert counts is not None
        assert indices is not None
        for row, here in enumerate(blocks):
            listed = indices[0, 0, row, : counts[0, 0, row]].tolist()
            assert listed == here.nonzero().flatten().tolist(), (name, row)


def three_kinds() -> list[Group]:
    """Groups with one, two and four responses; the second response to the long prompt is stored far from it."""
    ids = list(range(1, 120))
    return [
        Group(ids[:90], [ids[:40], ids[:7]]),
        Group(ids[:3], [ids[:5]]),
        Group(ids[:20], [ids[:11], ids[:3], ids[:30], [1]]),
    ]


def reference(inputs: list[Tensor], mask: Tensor, softcap: float | None, sinks: Tensor | None, scale: float) -> Tensor:
    """Attention (1, H, L, D) with all scores, written out."""
    query, key, value = inputs
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = scale * query @ key.transpose(-1, -2)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    weights = torch.where(mask, scores.exp(), 0)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[None, :, None, None]
    return weights / total @ value


CASES = [
    (9, 3, 2.0, False, 25),
    (4, 4, None, True, 7),
    pytest.param(4, 2, None, False, None, marks=pytest.mark.nightly),
    pytest.param(4, 1, 1.5, True, None, marks=pytest.mark.nightly),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("path", ["flex", "runs"])
@pytest.mark.parametrize(("heads", "key_heads", "softcap", "sink", "window"), CASES)
def test_outputs_and_gradients_in_float64(
    on_cpu: None, heads: int, key_heads: int, softcap: float | None, sink: bool, window: int | None, path: Any
) -> None:
    """Shared keys, nine heads, soft caps, sinks and windows, of every token that is not padding."""
    length = 256
    runs, (group, response, position) = one_row(three_kinds(), 240, length)
    assert 128 < len(runs.real) < length
    draw = torch.Generator().manual_seed(heads)
    options: dict[str, Any] = {"generator": draw, "dtype": torch.float64}
    size = length if path == "flex" else len(runs.real)
    inputs = [torch.randn(1, h, size, 8, **options).requires_grad_() for h in (heads, key_heads, key_heads)]
    sinks = torch.randn(heads, **options).requires_grad_() if sink else None
    group, response, position = (x[:, :size] for x in (group, response, position))
    expected = reference(inputs, group_attention_mask(group, response, position, window), softcap, sinks, 0.4)
    kwargs = {"softcap": softcap, "s_aux": sinks, "sliding_window": window}
    mask = runs_mask(runs, torch.device("cpu"), path, window)
    found, _ = group_sdpa(torch.nn.Module(), *inputs, mask, scaling=0.4, **kwargs)
    real = len(runs.real)
    expected, found = expected.transpose(1, 2)[:, :real], found[:, :real]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn(found.shape, **options)
    given_ = inputs if sinks is None else [*inputs, sinks]
    wanted = torch.autograd.grad((expected * weights).sum(), given_)
    for a, b in zip(torch.autograd.grad((found * weights).sum(), given_), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.slow
@pytest.mark.nightly  # the test above compiles each case with its gradient, once
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_one_compilation_serves_all_lengths_and_windows(on_cpu: None) -> None:
    """A further one serves evaluation, and a model with other heads; none is left to the uncompiled operation."""

    def compilations(responses: int, heads: int, window: int | None, train: bool = True) -> int:
        before = counters["stats"]["unique_graphs"]
        groups = [Group([3] * 150, [[4] * 100] * responses)]
        mask = runs_mask(pack(groups, 4096).runs, torch.device("cpu"), "flex", window)  # type: ignore[arg-type]
        length = padded_length(groups[0].tokens)
        inputs = [torch.randn(1, h, length, 8, requires_grad=train) for h in (heads, heads // 2, heads // 2)]
        with torch.set_grad_enabled(train):
            found, _ = group_sdpa(torch.nn.Module(), *inputs, mask, softcap=5.0, sliding_window=window)
            if train:
                found.sum().backward()
        return counters["stats"]["unique_graphs"] - before

    assert compilations(2, 4, None) == 1
    assert [compilations(n, 4, window) for n, window in ((3, None), (4, 20), (8, 33), (2, 20))] == [0, 0, 0, 0]
    assert compilations(3, 4, None, train=False) == 1
    assert compilations(5, 8, 20) == 1
    assert [compilations(n, heads, 9, train) for n, heads, train in ((7, 8, True), (6, 4, False), (2, 4, True))] == [
        0
    ] * 3


def test_a_block_mask_is_made_once_per_batch_and_device() -> None:
    batch = pack(three_kinds())
    runs = batch.runs
    assert runs is not None
    made = [runs_mask(runs, torch.device("cpu"), "flex", 20).allowed.masks for _ in range(2)]  # type: ignore[attr-defined]
    assert made[0].keys() == {None, 20}
    assert all(made[0][window] is made[1][window] for window in (None, 20))
    other = batch.to("cpu").runs
    assert other is not None
    assert not other.masks
    assert runs_mask(runs, torch.device("cpu"), "flex", 130).allowed.window is None  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore")
def test_a_mask_made_in_validation_may_be_used_in_training() -> None:
    with torch.inference_mode():
        mask = block_mask(pack(three_kinds()).runs)  # type: ignore[arg-type]
    assert not mask.kv_indices.is_inference()
