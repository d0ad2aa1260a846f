"""DPO and its relatives: the loss by hand, three ways to a reference that agree, and that preferences are learned."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from rlhf_lightning import DPO, PreferenceData
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.ops.groups import Group, pack
from tests.helpers.lightning import quiet_lightning
from tests.modules.offline import adam, assert_wilson, fit, lm, preferences, response_logprob, sgd, start, validate

GROUPS = [
    Group([1, 5, 6], [[8, 9, 2], [10, 2]], label=0.9),
    Group([1, 7], [[11, 2], [12, 13, 14, 2]]),
]


def moved() -> Any:
    """Return a policy that is not the reference any more."""
    model = lm()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return model


def build(**options: Any) -> DPO:
    module = DPO(lm, sgd(), **options)
    module.configure_model()
    module.policy.lm.load_state_dict(moved().state_dict())
    return module


def ratios(averaged: bool, reference: bool = True) -> list[list[torch.Tensor]]:
    found = []
    for group in GROUPS:
        found.append([])
        for y in group.responses:
            x = response_logprob(moved(), list(group.prompt), list(y))
            x = x - response_logprob(lm(), list(group.prompt), list(y)) if reference else x
            found[-1].append(x.mean() if averaged else x.sum())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "averaged"),
    [
        ({}, False),
        ({"label_smoothing": 0.1}, False),
        ({"loss": "robust", "label_smoothing": 0.2}, False),
        ({"length_normalized": True}, True),
        ({"loss": "ipo"}, True),
        ({"loss": "simpo", "target_margin": 0.3}, True),
        ({"sft_coef": 0.5}, False),
    ],
    ids=["sigmoid", "cdpo", "robust", "length", "ipo", "simpo", "sft term"],
)
def test_losses_by_hand(options: dict[str, Any], averaged: bool) -> None:
    beta = 0.4
    kind, eps = options.get("loss", "sigmoid"), options.get("label_smoothing", 0.0)
    expected = []
    for group, (chosen, rejected) in zip(GROUPS, ratios(averaged, kind != "simpo"), strict=True):
        h, p = chosen - rejected, group.label
        win, lose = -logsigmoid(beta * h), -logsigmoid(-beta * h)
        if kind == "sigmoid":
            p = p * (1 - eps) + (1 - p) * eps
        if kind == "robust":
            win, lose = ((1 - eps) * a - eps * b for a, b in ((win, lose), (lose, win)))
            win, lose = win / (1 - 2 * eps), lose / (1 - 2 * eps)
        if kind == "ipo":
            win, lose = (h - 1 / (2 * beta)) ** 2, (h + 1 / (2 * beta)) ** 2
        if kind == "simpo":
            win, lose = -logsigmoid(beta * h - 0.3), -logsigmoid(-beta * h - 0.3)
        term = p * win + (1 - p) * lose
        nll = -response_logprob(moved(), list(group.prompt), list(group.responses[0])).mean()
        expected.append(term + options.get("sft_coef", 0.0) * nll)
    loss = build(beta=beta, **options).training_step(pack(GROUPS), 0)
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("averaged", [False, True])
@quiet_lightning
def test_every_held_out_number_by_hand(averaged: bool) -> None:
    """Two pairs and a prompt whose responses tie, which has no pair: the loss is over prompts, the rest is not."""
    tied = Group([1, 9], [[5, 2], [6, 6, 2]], ranks=[0, 0])
    module = build(beta=0.4, label_smoothing=0.1, sft_coef=0.5, length_normalized=averaged)
    logged = validate(module, [GROUPS[:1], [GROUPS[1], tied]])
    rewards = [[0.4 * x.item() for x in pair] for pair in ratios(averaged)]
    for y in tied.responses:
        x = response_logprob(moved(), [1, 9], list(y)) - response_logprob(lm(), [1, 9], list(y))
        rewards.append([0.4 * (x.mean() if averaged else x.sum()).item()])
    logprobs = [
        [response_logprob(moved(), list(g.prompt), list(y)).sum().item() for y in g.responses] for g in (*GROUPS, tied)
    ]
    gaps = [chosen - rejected for chosen, rejected in rewards[:2]]
    smoothed = [0.9 * group.label + 0.1 * (1 - group.label) for group in GROUPS]
    losses = [math.log1p(math.exp(-gap)) + (1 - p) * gap for gap, p in zip(gaps, smoothed, strict=True)]
    right = sum(gap > 0 for gap in gaps)
    assert right == 1
    assert_wilson(logged.pop("val/accuracy_low"), logged.pop("val/accuracy_high"), right / 2, n=2)
    assert (
        logged
        == pytest.approx(
            {
                "val/loss": sum(losses) / 3,  # without the SFT term, so that runs compare
                "val/accuracy": right / 2,
                "val/margin": sum(gaps) / 2,
                "val/chosen_reward": sum(pair[0] for pair in rewards) / 4,
                "val/rejected_reward": sum(pair[1] for pair in rewards[:2]) / 2,
                "val/chosen_logprob": (logprobs[0][0] + logprobs[1][0] + sum(logprobs[2])) / 4,
                "val/rejected_logprob": (logprobs[0][1] + logprobs[1][1]) / 2,
            },
            rel=1e-5,
        )
    )


def test_the_adapter_off_reference_is_read_in_evaluation_mode() -> None:
    """A run with dropout is refused before its first update, so only a reference that is asked directly can tell."""
    module = DPO(partial(lm, attention_dropout=0.5), sgd(), lora={"r": 2, "alpha": 4, "dropout": 0.5})
    module.configure_model()
    module.train()
    expected = [response_logprob(lm(), list(g.prompt), list(y)).sum() for g in GROUPS for y in g.responses]
    torch.testing.assert_close(
        module.reference_logprobs(pack(GROUPS), "train"), torch.stack(expected), rtol=1e-6, atol=0
    )
    assert module.policy.training  # and the policy learns as before


def test_a_policy_that_is_its_reference_has_loss_log_two() -> None:
    module = DPO(lm, sgd(), beta=0.7)
    module.configure_model()
    assert module.training_step(pack(GROUPS), 0).item() == pytest.approx(math.log(2), abs=1e-6)
    assert module._sums["train"]["accuracy"][0].item() == 1.0  # two ties, half a point each


def test_reference_is_no_part_of_the_checkpoint_or_the_optimizer() -> None:
    module = build()
    trained = {id(p) for p in module.parameters()}
    assert module.reference is not None
    assert not trained & {id(p) for p in module.reference.model.parameters()}
    assert not any("reference" in name for name in module.state_dict())
    assert build(loss="simpo").reference is None


@pytest.mark.slow
@quiet_lightning
def test_live_cached_and_adapter_off_are_one_reference(tmp_path: Path) -> None:
    """Ten steps with LoRA from the same seed: the same losses, whichever way the reference is had."""
    folder = start(tmp_path)
    found = {}
    for reference in ("live", "cached", "adapter_off"):
        torch.manual_seed(0)
        data = PreferenceData(load_tokenizer(folder), preferences(), batch_size=8, cache_dir=tmp_path)
        lora = {"r": 4, "alpha": 8, "dropout": 0.0}
        module = DPO(partial(load_causal_lm, folder), adam(), lora=lora, reference=reference)  # type: ignore[arg-type]
        fit(module, data, 10)
        found[reference] = torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])
    assert found["live"].norm() > 1
    for name in ("cached", "adapter_off"):
        assert (found[name] - found["live"]).abs().max() < 1e-3, name  # Adam magnifies rounding near zero gradients


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"beta": 0.1}, {"loss": "ipo", "beta": 1.0}, {"loss": "simpo", "beta": 2.0}])
@quiet_lightning
def test_preferences_are_learned(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = start(tmp_path)
    rows = preferences(48)
    data = PreferenceData(load_tokenizer(folder), rows[:32], rows[32:], batch_size=16, cache_dir=tmp_path)
    module = DPO(partial(load_causal_lm, folder), adam(3e-3), **options)
    metrics = fit(module, data, 20).callback_metrics
    assert metrics["val/accuracy"] == 1.0
    assert metrics["val/margin"] > 0.1
    assert metrics["val/chosen_reward"] > metrics["val/rejected_reward"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "sigmiod"}, r"dpo\.loss='sigmiod' is not one of .*sigmoid"),
        ({"beta": 0.0}, r"^dpo\.beta=0.0 is not a finite number in \(0, inf\)$"),
        ({"beta": float("nan")}, r"^dpo\.beta=nan "),
        ({"loss": "simpo", "target_margin": -1.0}, r"^dpo\.target_margin=-1.0 "),
        ({"sft_coef": -0.1}, r"^dpo\.sft_coef=-0.1 "),
        ({"label_smoothing": 0.5}, r"in \[0, 0\.5\)"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "ipo does not use it"),
        ({"target_margin": 1.0}, r"target_margin is SimPO's"),
        ({"reference": "adapter_off"}, "add adapter=lora"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DPO(lm, sgd(), **options)


@pytest.mark.parametrize(
    ("loss", "beta", "margin"), [("sigmoid", 0.1, 0.0), ("robust", 0.1, 0.0), ("ipo", 0.5, 0.0), ("simpo", 2.0, 1.0)]
)
def test_beta_and_margin_have_the_scale_of_their_loss(loss: Any, beta: float, margin: float) -> None:
    module = DPO(lm, sgd(), loss=loss)
    assert (module.beta, module.target_margin) == (beta, margin)
    assert DPO(lm, sgd(), loss="simpo", beta=2.5).target_margin == 1.25
    given = DPO(lm, sgd(), loss="simpo", beta=2.5, target_margin=0.0)
    assert (given.beta, given.target_margin) == (2.5, 0.0)
