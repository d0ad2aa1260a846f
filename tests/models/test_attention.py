"""Attention by runs is attention with the dense group mask, and computes only what the mask allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rlhf_lightning.models.attention import GROUP_SDPA, group_sdpa, runs_mask, varlen
from rlhf_lightning.models.completion import (
    CompletionModel,
    attention_path,
    choose_layout,
    describe_attention,
    hidden_states,
)
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.ops.groups import Group, pack
from rlhf_lightning.ops.masking import group_attention_mask
from rlhf_lightning.ops.runs import Run, find_runs
from tests.helpers.models import tiny_config
from tests.helpers.plain import bottom_right

tokens = st.lists(st.integers(3, 63), min_size=1, max_size=5)
some_groups = st.lists(st.builds(Group, tokens, st.lists(tokens, min_size=1, max_size=4)), min_size=1, max_size=5)


def test_runs_by_hand() -> None:
    """A group with three responses, one with one, and padding; then a row of its own."""
    groups = torch.tensor([[0] * 6 + [1] * 3 + [-1] * 2, [2] * 5 + [-1] * 6])
    responses = torch.tensor([[0, 0, 1, 2, 2, 3, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, *[0] * 6]])
    first = [Run(2), Run(1, 0, first=True), Run(2, 0), Run(1, 0), Run(1), Run(2, 4, first=True)]
    runs = find_runs(groups, responses)
    assert runs.runs == [*first, Run(3), Run(2, 6, first=True)]
    assert runs.real.tolist() == [*range(9), *range(11, 16)]
    assert runs.key_tokens.tolist() == [0, 1, 2, 0, 1, 3, 4, 0, 1, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert (runs.query_ends.tolist(), runs.key_ends.tolist()) == ([0, 3, 5, 6, 9, 14], [0, 3, 7, 10, 13, 18])
    assert runs.longest == (5, 5)


@pytest.mark.slow
@given(some_groups, st.integers(1, 60))
@settings(max_examples=80, deadline=None)
def test_equal_to_the_dense_mask(groups: list[Group], row_tokens: int) -> None:
    """Outputs and gradients at every token that is not padding, with fewer key heads than query heads."""
    batch = pack(groups, row_tokens)
    rows, length = batch.input_ids.shape
    draw = torch.Generator().manual_seed(rows * length)
    query, key, value = (
        torch.randn(rows, heads, length, 8, generator=draw, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    mask = group_attention_mask(batch.group_ids, batch.response_ids)
    real = (batch.group_ids >= 0).flatten()
    repeated = (x.repeat_interleave(2, 1) for x in (key, value))
    dense = scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3).transpose(1, 2)
    dense = dense.flatten(0, 1)[real]
    flat = (x.transpose(1, 2).flatten(0, 1)[real].transpose(0, 1)[None] for x in (query, key, value))
    runs = runs_mask(find_runs(batch.group_ids, batch.response_ids), mask.device)
    found = group_sdpa(torch.nn.Module(), *flat, runs, scaling=0.3)[0][0]
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-12)
    weights = torch.randn(found.shape, generator=draw, dtype=torch.float64)
    expected = torch.autograd.grad((dense * weights).sum(), (query, key, value))
    for a, b in zip(torch.autograd.grad((found * weights).sum(), (query, key, value)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_padding_is_not_computed_and_short_runs_are_left_to_the_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """127 tokens for two responses are too few to be read as one row, 128 are not."""
    model = LlamaForCausalLM(tiny_config())
    model.set_attn_implementation(GROUP_SDPA)
    read: list[Any] = []
    model.model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].shape), with_kwargs=True
    )
    for last in (47, 48):
        batch = pack([Group([1] * 10, [[2] * 40]), Group([1] * 30, [[3] * last])], row_tokens=80)
        assert hidden_states(model, batch).shape == (2 * (30 + last), model.config.hidden_size)
    assert read == [(2, 77), (1, 128)]


def test_loaded_models_use_it_and_are_saved_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path)
    model: Any = load_causal_lm(str(tmp_path)).eval()
    assert model.config._attn_implementation == GROUP_SDPA
    seen = []

    def counting(q: Any, k: Any, v: Any, **options: Any) -> Any:
        seen.append((q.shape[2], k.shape[2]))
        return scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr("rlhf_lightning.models.attention.scaled_dot_product_attention", counting)
    batch = pack([Group([1, 2, 3], [[4, 5], [6], [7, 8]]), Group([9], [[10, 11, 12]])], 64)
    assert batch.input_ids.shape == (1, 12)
    found = hidden_states(model, batch, path="runs")
    assert seen == [(5, 5), (1, 4), (2, 5), (4, 4)] * 2  # of 12 x 12 pairs of tokens, in each of two layers
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(hidden_states(model, batch), found, rtol=1e-5, atol=1e-6)
    model.set_attn_implementation(GROUP_SDPA)
    model.save_pretrained(tmp_path / "saved")
    assert GROUP_SDPA not in (tmp_path / "saved" / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config._attn_implementation == "sdpa"


def test_another_attention_may_be_asked_for(tmp_path: Path) -> None:
    """Hugging Face's eager attention adds a mask of truth values as numbers, so it gets padded rows."""
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path)
    groups = [Group([1, 2, 3], [[4, 5], [6]])]
    found = []
    for kind, layout in (("eager", "padded"), ("sdpa", "packed")):
        model = load_causal_lm(str(tmp_path), attn_implementation=kind).eval()
        assert choose_layout(model)[0] == layout
        found.append(CompletionModel(model)(pack(groups, layout=layout)).logprobs)  # type: ignore[arg-type]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_the_probe_reads_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose attention by runs is wrong is read with the dense mask, which is right; so is its reference."""
    monkeypatch.setattr("rlhf_lightning.models.completion._CHOSEN", {})
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path))
    batch = pack([Group([1] * 90, [[2] * 50])])
    assert choose_layout(model) == ("packed", None)
    assert attention_path(model, batch) == "runs"
    assert describe_attention(model).startswith("one call of scaled dot product attention per response")
    monkeypatch.setattr(
        "rlhf_lightning.models.attention.scaled_dot_product_attention",
        lambda q, k, v, **options: 1.5 * scaled_dot_product_attention(q, k, v, **options),
    )
    assert choose_layout(model) == ("packed", None)
    assert attention_path(load_causal_lm(str(tmp_path)), batch) == "dense"
    assert describe_attention(model).startswith("a dense attention mask (float32 on cpu)")


@pytest.mark.slow
@given(some_groups, st.integers(1, 60))
@settings(max_examples=80, deadline=None)
def test_one_varlen_call_is_the_dense_mask(groups: list[Group], row_tokens: int) -> None:
    """The segments of varlen attention: outputs and gradients at every token that is not padding."""
    batch = pack(groups, row_tokens)
    runs = batch.runs
    assert runs is not None
    draw = torch.Generator().manual_seed(row_tokens)
    query, key, value = (
        torch.randn(len(runs.real), heads, 8, generator=draw, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    group_ids, response_ids = (x.flatten()[runs.real][None] for x in (batch.group_ids, batch.response_ids))
    parts = (x.repeat_interleave(r, 1).transpose(0, 1)[None] for x, r in ((query, 1), (key, 2), (value, 2)))
    mask = group_attention_mask(group_ids, response_ids)
    dense = scaled_dot_product_attention(*parts, attn_mask=mask, scale=0.3)[0].transpose(0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_lightning.models.attention.varlen_attn", bottom_right)
        found = varlen(query, key, value, runs, 0.3)
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-12)
    weights = torch.randn(found.shape, generator=draw, dtype=torch.float64)
    expected = torch.autograd.grad((dense * weights).sum(), (query, key, value))
    for a, b in zip(torch.autograd.grad((found * weights).sum(), (query, key, value)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
