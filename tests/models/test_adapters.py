"""LoRA: switched off it is the base model, merged it is the adapted one, and no head is lost."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapters import adapter_off, add_lora, merge_lora
from tests.helpers.models import tiny_config

IDS = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 10, 11, 2]])


@pytest.fixture
def tiny_scorer() -> LlamaForSequenceClassification:
    torch.manual_seed(3)
    return LlamaForSequenceClassification(tiny_config(num_labels=1)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def disturb(model: nn.Module, seed: int = 4) -> None:
    """Give the LoRA matrices B, which start at zero, an effect far above rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def train_a_step(model: nn.Module) -> None:
    """Take one SGD step that moves every parameter with a gradient by far more than rounding."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    model(IDS).logits.float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def test_the_adapter_switched_off_is_the_base_model(tiny_lm: LlamaForCausalLM) -> None:
    base = logits(tiny_lm)
    model = add_lora(tiny_lm, dropout=0.3).eval()
    assert torch.equal(logits(model), base)  # B = 0 at the start
    disturb(model)
    adapted = logits(model)
    assert (adapted - base).abs().max() > 1e-2
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    with adapter_off(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable


def test_the_adapter_is_on_again_after_an_error(tiny_lm: LlamaForCausalLM) -> None:
    model = add_lora(tiny_lm).eval()
    disturb(model)
    adapted = logits(model)
    with pytest.raises(RuntimeError, match="inside"), adapter_off(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), adapted)


def test_adapter_off_leaves_a_plain_model_alone(tiny_lm: LlamaForCausalLM) -> None:
    base = logits(tiny_lm)
    with adapter_off(tiny_lm):
        assert torch.equal(logits(tiny_lm), base)
    assert merge_lora(tiny_lm) is tiny_lm


def test_a_gradient_taken_around_a_reference_pass_is_the_same(tiny_lm: LlamaForCausalLM) -> None:
    model = add_lora(tiny_lm)
    disturb(model)

    def gradients(reference: bool) -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(IDS).logits.square().mean()
        if reference:
            with torch.no_grad(), adapter_off(model):
                model(IDS)
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain, around = gradients(False), gradients(True)
    assert plain
    assert plain.keys() == around.keys()
    assert all(torch.equal(plain[name], around[name]) for name in plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "alpha": 32},
        {"r": 4, "alpha": 32, "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"]},
    ],
    ids=["all-linear", "rslora", "listed"],
)
def test_the_merged_model_is_the_adapted_one_and_plain(
    tiny_lm: LlamaForCausalLM, tmp_path: Path, settings: dict[str, Any]
) -> None:
    keys, base = list(tiny_lm.state_dict()), logits(tiny_lm)
    model = add_lora(tiny_lm, **settings).eval()
    disturb(model)
    adapted = logits(model)
    assert (adapted - base).abs().max() > 1e-3
    merged = merge_lora(model)
    torch.testing.assert_close(logits(merged), adapted, rtol=0, atol=1e-5)
    assert type(merged) is LlamaForCausalLM
    assert list(merged.state_dict()) == keys
    assert all(p.requires_grad for p in merged.parameters())
    merged.save_pretrained(tmp_path / "model")
    assert not list((tmp_path / "model").glob("adapter*"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    opened, info = loaded
    assert not any(info.values()), info
    torch.testing.assert_close(logits(opened.eval()), adapted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 4), (True, 32 / 4**0.5)])
def test_the_update_is_scaled_by_alpha_over_rank(tiny_lm: LlamaForCausalLM, rslora: bool, scale: float) -> None:
    before = tiny_lm.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = add_lora(tiny_lm, r=4, alpha=32, use_rslora=rslora)
    disturb(model)
    state = {n.split("self_attn.")[1]: p for n, p in model.named_parameters() if "layers.0.self_attn.q_proj" in n}
    update = state["q_proj.lora_B.default.weight"] @ state["q_proj.lora_A.default.weight"]
    after = merge_lora(model).model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(after - before, scale * update, rtol=0, atol=1e-6)


def test_merging_does_not_touch_the_model_in_training(tiny_lm: LlamaForCausalLM) -> None:
    model = add_lora(tiny_lm).eval()
    disturb(model)
    adapted = logits(model)
    exported = merge_lora(model)
    snapshot = logits(exported)
    assert torch.equal(logits(model), adapted)
    train_a_step(model)
    assert (logits(model) - adapted).abs().max() > 1e-4
    assert torch.equal(logits(exported), snapshot)


def test_only_the_adapter_moves(tiny_lm: LlamaForCausalLM) -> None:
    frozen = copy.deepcopy(tiny_lm.state_dict())
    model = add_lora(tiny_lm, r=4)
    disturb(model)
    train_a_step(model)
    with adapter_off(model):
        assert torch.equal(logits(model), logits(_with(frozen)))
    linear = [m for m in _with(frozen).model.modules() if isinstance(m, nn.Linear)]
    expected = sum(4 * (m.in_features + m.out_features) for m in linear)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def _with(state: dict[str, Tensor]) -> LlamaForCausalLM:
    model = LlamaForCausalLM(tiny_config()).eval()
    model.load_state_dict(state)
    return model


def test_the_score_head_trains_and_survives_checkpoint_and_merge(
    tiny_scorer: LlamaForSequenceClassification, tmp_path: Path
) -> None:
    start = copy.deepcopy(tiny_scorer)
    head = start.score.weight.detach().clone()
    tiny_scorer.config.reward_mean, tiny_scorer.config.reward_std = 0.25, 1.5
    model = add_lora(tiny_scorer)
    names = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert names == ["base_model.model.score.weight"]  # one head: neither a copy of it nor LoRA on it
    assert not [n for n, _ in model.named_parameters() if "lora_" in n and "score" in n]
    disturb(model)
    train_a_step(model)
    assert (tiny_scorer.score.weight - head).abs().max() > 1e-4
    scores = logits(model)

    torch.save(model.state_dict(), tmp_path / "last.ckpt")
    resumed = add_lora(start).eval()
    resumed.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True))
    assert torch.equal(logits(resumed), scores)

    merge_lora(model).save_pretrained(tmp_path / "model")
    opened, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(opened.score.weight, tiny_scorer.score.weight)
    torch.testing.assert_close(logits(opened.eval()), scores, rtol=0, atol=1e-5)
    assert (opened.config.reward_mean, opened.config.reward_std) == (0.25, 1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"target_modules": ["nope"]}, "nope"), ({"r": 0}, "positive")],
)
def test_impossible_settings_are_told(tiny_lm: LlamaForCausalLM, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"adapter: .*{message}"):
        add_lora(tiny_lm, **settings)
