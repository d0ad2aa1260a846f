"""Reward models: the loss by hand, what is exported, and that separable preferences are ordered."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_lightning import PreferenceData, RewardModel
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.folder import write_model
from rlhf_lightning.models.loading import load_scalar_model, load_tokenizer
from rlhf_lightning.ops.groups import Group, pack
from rlhf_lightning.ops.statistics import share_interval
from tests.helpers.lightning import quiet_lightning
from tests.modules.offline import WORDS, Batches, adam, assert_wilson, classifier, fit, preferences, sgd, start


def score(prompt: list[int], response: list[int]) -> torch.Tensor:
    """Score one response with a plain forward pass of the classifier."""
    return classifier()(torch.tensor([[*prompt, *response]])).logits[0, 0]


def test_loss_of_pairs_with_margin_and_soft_label() -> None:
    module = RewardModel(classifier, sgd(), center=0.01)
    module.configure_model()
    groups = [
        Group([1, 5, 6], [[8, 9, 2], [10, 2]], margin=0.7),
        Group([1, 7], [[11, 2], [12, 13, 14, 2]], label=0.8),
    ]
    expected = []
    for group in groups:
        chosen, rejected = (score(list(group.prompt), list(y)) for y in group.responses)
        gap = chosen - rejected
        term = -group.label * logsigmoid(gap - group.margin) - (1 - group.label) * logsigmoid(-gap - group.margin)
        expected.append(term + 0.01 * (chosen + rejected) ** 2)
    loss = module.training_step(pack(groups), 0)
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)


@pytest.mark.parametrize("loss", ["pairwise", "plackett_luce"])
def test_rankings(loss: str) -> None:
    module = RewardModel(classifier, sgd(), loss=loss, center=0.0)  # type: ignore[arg-type]
    module.configure_model()
    responses, ranks = [[8, 2], [9, 9, 2], [10, 2], [11, 12, 2]], [0, 1, 1, 2]
    scores = [score([1, 5], y).item() for y in responses]
    pairs = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]  # 1 and 2 tie
    expected = sum(math.log1p(math.exp(scores[b] - scores[a])) for a, b in pairs) / len(pairs)
    if loss == "plackett_luce":
        denominators = [math.log(sum(math.exp(scores[j]) for j in later)) for later in (range(4), range(1, 4))]
        expected = sum(denominators) + denominators[1] - sum(scores[:3])
    found = module.training_step(pack([Group([1, 5], responses, ranks=ranks)]), 0)
    assert found.item() == pytest.approx(expected, rel=1e-6)


@quiet_lightning
def test_every_logged_number_by_hand() -> None:
    """Five prompts in two batches, four of them with a pair: a prompt whose responses tie counts as a prompt only."""
    parts = [
        [Group([1, 5, 6], [[8, 9, 2], [10, 2]], margin=0.7), Group([1, 9], [[5, 2], [6, 2]], ranks=[0, 0])],
        [
            Group([1, 7], [[11, 2], [12, 13, 14, 2]], label=0.8),
            Group([1, 8], [[15, 2], [15, 2]]),  # equal scores: half a point
            Group([1, 11], [[16, 2], [17, 18, 2]], ranks=[1, 0]),
        ],
    ]
    losses, gaps, best, rest = [], [], [], []
    for group in (group for part in parts for group in part):
        scores = [score(list(group.prompt), list(y)).item() for y in group.responses]
        ranks = group.ranks or [0, 1]
        best += [s for s, rank in zip(scores, ranks, strict=True) if rank == 0]
        rest += [s for s, rank in zip(scores, ranks, strict=True) if rank == 1]
        gap = torch.tensor((scores[0] - scores[1]) * (ranks[1] - ranks[0])).double()
        m, p = group.margin, group.label
        loss = -p * logsigmoid(gap - m) - (1 - p) * logsigmoid(-gap - m)
        losses.append(loss.item() if ranks != [0, 0] else 0.0)
        gaps += [gap.item()] if ranks != [0, 0] else []
    # expected calibration error over ten bins, each pair in both orders
    bins: dict[int, list[tuple[float, int]]] = {}
    for gap in gaps:
        chance = 1 / (1 + math.exp(-gap))
        for forecast, outcome in ((chance, 1), (1 - chance, 0)):
            bins.setdefault(int(forecast * 10), []).append((forecast, outcome))
    errors = [abs(sum(forecast - outcome for forecast, outcome in forecasts)) for forecasts in bins.values()]
    scores, right = (
        torch.tensor(best + rest).double(),
        sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps),
    )
    assert 0 < right < 3.5
    expected = {
        "loss": sum(losses) / 5,
        "accuracy": right / 4,
        "margin": sum(gaps) / 4,
        "chosen_score": sum(best) / 6,
        "rejected_score": sum(rest) / 4,
        "score_mean": scores.mean().item(),
        "score_std": scores.std(correction=0).item(),
    }
    trainer = fit(RewardModel(classifier, sgd(lr=0.0)), Batches(parts, parts), 1, accumulate=2)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {k[6:]: v for k, v in logged.items() if k[:6] == "train/"} == pytest.approx(expected, rel=1e-5)
    assert_wilson(logged.pop("val/accuracy_low"), logged.pop("val/accuracy_high"), right / 4, n=4)
    expected["calibration_error"] = sum(errors) / 8
    assert {k[4:]: v for k, v in logged.items() if k[:4] == "val/"} == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@quiet_lightning
def test_separable_pairs_are_ordered_and_the_export_says_the_same(tmp_path: Path, seed: int) -> None:
    folder = start(tmp_path)
    tokenizer = load_tokenizer(folder)
    rows = preferences(48)
    data = PreferenceData(tokenizer, rows[:32], rows[32:], batch_size=16, seed=seed, cache_dir=tmp_path)
    module = RewardModel(lambda: load_scalar_model(folder, seed=seed), adam())
    trainer = fit(module, data, 40)
    assert trainer.callback_metrics["val/accuracy"] == 1.0
    assert 0.7 < trainer.callback_metrics["val/accuracy_low"] < 0.95  # 16 pairs do not prove more
    write_model(tmp_path / "model", module.export_model(), tokenizer, {})
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    plain = AutoTokenizer.from_pretrained(tmp_path / "model")
    held = []
    for row in rows[32:]:
        for text in (row["chosen"], row["rejected"]):
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text}]
            ids = torch.tensor([plain.apply_chat_template(turns)["input_ids"]])
            held.append(exported(ids).logits[0, 0].item())
    mean, std = exported.config.reward_mean, exported.config.reward_std
    assert mean == pytest.approx(sum(held) / len(held), abs=1e-4)  # the statistics are those of the held-out scores
    assert std == pytest.approx(torch.tensor(held).std(correction=0).item(), rel=1e-3)
    assert all(good > bad for good, bad in zip(held[::2], held[1::2], strict=True))


@pytest.mark.parametrize("extra", [{"label": 0.5}, {"margin": 1.0}])
def test_plackett_luce_does_not_drop_what_a_row_says(extra: dict[str, float]) -> None:
    module = RewardModel(classifier, sgd(), loss="plackett_luce")
    module.configure_model()
    with pytest.raises(UserError, match="uses neither margin nor label"):
        module.on_before_batch_transfer([Group([1, 5], [[8, 2], [9, 2]], **extra)], 0)  # type: ignore[arg-type]


@quiet_lightning
def test_statistics_of_scores_far_from_zero_are_exact() -> None:
    """Scores of 1e4 +- 0.5: a mean of float32 sums would leave no digit of their deviation."""
    module = RewardModel(classifier, sgd(lr=0.0), center=0.0)
    module.configure_model()
    scores = 1e4 + torch.arange(8).float() / 8
    module.scorer.forward = lambda batch: scores[: batch.sequences]  # type: ignore[method-assign,assignment]
    module.losses(pack([Group([1, 5], [[8, 2], [9, 2]]) for _ in range(4)]), "train")
    totals, counts = (torch.stack(x).tolist() for x in zip(*module._sums["train"].values(), strict=True))
    names = list(module._sums["train"])
    mean, square = (totals[names.index(name)] / counts[names.index(name)] for name in ("score_mean", "score_squared"))
    assert square - mean**2 == pytest.approx(scores.double().var(correction=0).item(), rel=1e-6)


def test_unknown_loss_is_refused() -> None:
    with pytest.raises(UserError, match=r"reward\.loss='listwise' is not one of"):
        RewardModel(classifier, sgd(), loss="listwise")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["rankings", "rows", "loader"])
@quiet_lightning
def test_pairs_of_one_prompt_are_one_cluster(form: str, tmp_path: Path) -> None:
    """Four rankings of three, their twelve pairs as rows, a loader of groups: the interval is that of four prompts."""
    folder = start(tmp_path)
    rankings = [[" ".join(WORDS[place : place + n]) for n in (1, 2, 3)] for place in range(4)]
    rows: list[dict[str, Any]] = []
    for number, texts in enumerate(rankings):
        prompt = f"name {WORDS[number]}"
        if form != "rows":
            rows.append({"prompt": prompt, "responses": texts, "ranking": [0, 1, 2]})
        else:
            rows += [{"prompt": prompt, "chosen": texts[i], "rejected": texts[j]} for i, j in ((0, 1), (0, 2), (1, 2))]
    tokenizer = load_tokenizer(folder)
    data = PreferenceData(tokenizer, rows, rows, batch_size=len(rows), cache_dir=tmp_path)
    module = RewardModel(lambda: load_scalar_model(folder, seed=1), sgd(lr=0.0))
    outcomes, prompts, groups = [], [], []
    for number, texts in enumerate(rankings):
        prompt = data.template.prompt([{"role": "user", "content": f"name {WORDS[number]}"}])
        groups.append(Group(prompt, [data.template.response(text) for text in texts]))
    loader = Batches([groups], [groups[:2], groups[2:]])
    logged = fit(module, loader if form == "loader" else data, 1).callback_metrics
    for number, group in enumerate(groups):
        first, second, third = module.scorer(pack([group])).tolist()
        outcomes += [float(first > second), float(first > third), float(second > third)]
        prompts += [number] * 3
    share, low, high = share_interval(outcomes, prompts)
    assert 0 < share < 1
    assert logged["val/accuracy"] == pytest.approx(share)
    assert (logged["val/accuracy_low"], logged["val/accuracy_high"]) == pytest.approx((low, high), abs=1e-6)
