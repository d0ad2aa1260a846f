"""A head per group: what each learns, what a single head cannot, and that one group is the plain reward model."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from rlhf_lightning import PreferenceData, RewardModel
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.reward_model import evaluate_reward_model
from rlhf_lightning.models.folder import write_model
from rlhf_lightning.models.heads import with_heads
from rlhf_lightning.models.loading import load_scalar_model, load_tokenizer
from rlhf_lightning.ops.groups import Group, pack
from tests.helpers.lightning import quiet_lightning
from tests.modules.offline import WORDS, Batches, adam, classifier, fit, preferences, sgd, start

GROUPS = ["old", "young"]


def opposed(count: int) -> list[dict[str, str]]:
    """Return pairs in which the old, one in five, dislike "gold" and the young like it, whatever the prompt."""
    rows, rng = [], random.Random(0)
    for row in preferences(count):
        if rng.random() > 0.2:
            rows.append(row | {"group": "young"})
        else:
            rows.append(row | {"chosen": row["rejected"], "rejected": row["chosen"], "group": "old"})
    return rows


def two_heads() -> Any:
    """Return a float64 classifier whose two heads differ."""
    model = with_heads(classifier, GROUPS)
    torch.manual_seed(5)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    return model


@pytest.mark.parametrize("loss", ["pairwise", "plackett_luce"])
def test_the_group_selects_the_head_by_hand(loss: Any) -> None:
    module = RewardModel(two_heads, sgd(), loss=loss, center=0.01, groups=GROUPS)
    module.configure_model()
    whose = ["young", "old", None]
    groups = [Group([1, 5 + i], [[8, 9 + i, 2], [10, 2]], annotators=name) for i, name in enumerate(whose)]
    model = two_heads()
    terms = []
    for group, name in zip(groups, whose, strict=True):
        first, second = (model(torch.tensor([[*group.prompt, *y]])).logits[0] for y in group.responses)
        per_head = -logsigmoid(first - second) + 0.01 * (first + second) ** 2
        terms.append(per_head.mean() if name is None else per_head[GROUPS.index(name)])
    assert module.training_step(pack(groups), 0).item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-6)


def test_a_head_learns_from_its_group_only() -> None:
    module = RewardModel(two_heads, sgd(), center=0.0, groups=GROUPS)
    module.configure_model()
    module.training_step(pack([Group([1, 5], [[8, 2], [9, 2]], annotators="young")]), 0).backward()
    gradient = module.scorer.model.score.weight.grad
    assert gradient is not None
    assert gradient[0].abs().max() == 0
    assert gradient[1].abs().max() > 0


@pytest.mark.slow
@quiet_lightning
def test_heads_order_what_a_single_head_cannot(tmp_path: Path) -> None:
    """Planted: the groups want opposite things. The single head learns the majority's, and reverses the minority's."""
    folder, rows = start(tmp_path), opposed(150)
    tokenizer = load_tokenizer(folder)
    data = partial(PreferenceData, tokenizer, rows[:100], rows[100:], batch_size=25, cache_dir=tmp_path)
    found = {}
    for name, groups in (("single", None), ("heads", GROUPS)):
        module = RewardModel(partial(load_scalar_model, folder), adam(), groups=groups)
        trainer = fit(module, data(), 50)
        write_model(tmp_path / name, module.export_model(), tokenizer, {})
        model = load_scalar_model(str(tmp_path / name), trained=True)
        held_out = data()
        held_out.setup()
        found[name], pairs = evaluate_reward_model(model, held_out)
        assert pairs == 50
        if groups:
            logged = {key: value.item() for key, value in trainer.callback_metrics.items()}
            for metric in ("accuracy", "accuracy_old", "accuracy_young", "accuracy_mean", "accuracy_worst"):
                assert logged[f"val/{metric}"] == pytest.approx(found[name][metric][0]), metric
    shares = {name: {metric: share for metric, (share, *_) in table.items()} for name, table in found.items()}
    assert min(shares["heads"]["accuracy_old"], shares["heads"]["accuracy_young"]) > 0.9
    assert shares["single"]["accuracy_young"] > 0.9
    assert shares["single"]["accuracy_old"] == shares["single"]["accuracy_worst"] < 0.2
    mean = (shares["single"]["accuracy_old"] + shares["single"]["accuracy_young"]) / 2
    assert shares["single"]["accuracy_mean"] == pytest.approx(mean)


@quiet_lightning
def test_one_group_is_the_plain_reward_model_bit_for_bit(tmp_path: Path) -> None:
    folder, rows = start(tmp_path), [row | {"group": "all"} for row in preferences(24)]
    weights, logged, scales = [], [], []
    for groups in (None, ["all"]):
        data = PreferenceData(load_tokenizer(folder), rows[:16], rows[16:], batch_size=8, cache_dir=tmp_path)
        module = RewardModel(partial(load_scalar_model, folder), adam(), groups=groups)
        trainer = fit(module, data, 4)
        weights.append(list(module.scorer.parameters()))
        logged.append({k: v.item() for k, v in trainer.callback_metrics.items()})
        config = module.export_model().config
        scales.append((config.reward_mean, config.reward_std))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert logged[0].items() <= logged[1].items()
    assert scales[1] == ([scales[0][0]], [scales[0][1]])


@quiet_lightning
def test_each_head_is_normalized_over_all_responses(tmp_path: Path) -> None:
    folder, rows = start(tmp_path), opposed(30)
    data = PreferenceData(load_tokenizer(folder), rows[:16], rows[16:], batch_size=8, cache_dir=tmp_path)
    module = RewardModel(partial(load_scalar_model, folder), adam(), groups=GROUPS)
    fit(module, data, 6)
    raw = torch.cat([module.scorer(batch.pack()).detach() for batch in data.val_dataloader()]).double()
    assert raw.shape == (28, 2)
    config = module.export_model().config
    assert config.reward_mean == pytest.approx(raw.mean(0).tolist(), rel=1e-5, abs=1e-6)
    assert config.reward_std == pytest.approx(raw.std(0, correction=0).tolist(), rel=1e-5)


@quiet_lightning
def test_a_step_without_a_group_logs_no_accuracy_of_it() -> None:
    young = [[Group([1, 5], [[8, 2], [9, 2]], annotators="young")]]
    trainer = fit(RewardModel(two_heads, sgd(), groups=GROUPS), Batches(young, young), 1)
    assert "val/accuracy_young" in trainer.callback_metrics
    assert "val/accuracy_old" not in trainer.callback_metrics
    assert trainer.callback_metrics["val/accuracy_worst"] == trainer.callback_metrics["val/accuracy_young"]


@quiet_lightning
def test_a_group_without_a_head_is_told_before_the_first_step(tmp_path: Path) -> None:
    folder, rows = start(tmp_path), preferences(16)
    rows[11] |= {"group": "yung"}
    data = PreferenceData(load_tokenizer(folder), rows, batch_size=4, cache_dir=tmp_path)
    module = RewardModel(partial(load_scalar_model, folder), sgd(), groups=GROUPS)
    message = "row 12: the group 'yung' has no head; reward.groups is old, young. Did you mean 'young'"
    with pytest.raises(UserError, match=message):
        fit(module, data, 1)
    held_out = PreferenceData(load_tokenizer(folder), None, rows, cache_dir=tmp_path)
    held_out.setup()
    with pytest.raises(UserError, match="row 12: the group 'yung' has no head, only old, young. Did you mean 'young'"):
        evaluate_reward_model(with_heads(partial(load_scalar_model, folder), GROUPS), held_out)
    own = RewardModel(two_heads, sgd(), groups=GROUPS)
    own.configure_model()
    with pytest.raises(UserError, match="row -1: the group 'nobody' has no head"):
        own.training_step(pack([Group([1, 5], [[8, 2], [9, 2]], annotators="nobody")]), 0)


@quiet_lightning
def test_samples_show_the_score_of_each_group(tmp_path: Path) -> None:
    folder, rows = start(tmp_path), opposed(8)
    data = PreferenceData(load_tokenizer(folder), rows, batch_size=4, cache_dir=tmp_path)
    module = RewardModel(partial(load_scalar_model, folder), adam(), groups=GROUPS)
    fit(module, data, 2)
    for row, sample in zip(rows[:2], module.text_samples(2, 8, None)[::2], strict=True):  # type: ignore[arg-type]
        assert sample["score"] == pytest.approx(sample[f"score_{row['group']}"])
    assert {"prompt", "response", "rank", "score", "score_old", "score_young"} == sample.keys()


@pytest.mark.parametrize("numbers", [1, 2.5, "a"])
def test_groups_survive_the_cache(numbers: Any, tmp_path: Path) -> None:
    rows = [row | ({"group": numbers} if i % 2 else {}) for i, row in enumerate(preferences(6))]
    data = PreferenceData(load_tokenizer(start(tmp_path)), rows, batch_size=2, cache_dir=tmp_path)
    data.setup()
    assert [data.group("train", i).annotators for i in range(6)] == [None, str(numbers)] * 3
    named = [{"prompt": f"say {word}", "chosen": "a", "rejected": "b", "who": "ü"} for word in WORDS[:3]]
    mapped = PreferenceData(
        data.tokenizer, named, [named[0]], columns={"group": "who"}, batch_size=2, cache_dir=tmp_path
    )
    mapped.setup()
    assert mapped.group("train", 2).annotators == "ü"
