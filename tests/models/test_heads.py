"""Heads of groups: they start as one, keep their names in the folder, and fold into one linear head exactly."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_lightning import PreferenceData, RewardModel
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.completion import ScalarModel
from rlhf_lightning.models.folder import write_model
from rlhf_lightning.models.heads import check_names, fold, heads, with_heads
from rlhf_lightning.models.loading import load_scalar_model, load_tokenizer
from rlhf_lightning.ops.groups import Group, pack
from tests.helpers.lightning import quiet_lightning
from tests.modules.offline import adam, classifier, fit, preferences, start

BATCH = pack([Group([1, 5, 6], [[8, 9, 2], [10, 2]]), Group([1, 7], [[11, 2]])])


def grouped() -> torch.nn.Module:
    """Return a classifier with heads for two groups that differ, and statistics of each."""
    model = with_heads(classifier, ["old", "young"])
    torch.manual_seed(3)
    torch.nn.init.normal_(model.score.weight)
    model.config.reward_mean, model.config.reward_std = [0.5, -2.0], [2.0, 0.25]
    return model


def test_heads_are_copies_of_the_one_there_was() -> None:
    model, single = with_heads(classifier, ["old", "young"]), classifier()
    expected = ScalarModel(single)(BATCH)
    assert torch.equal(ScalarModel(model)(BATCH), torch.stack([expected, expected], 1))
    assert heads(model.config) == ["old", "young"]
    assert heads(single.config) == []


def test_each_head_is_normalized_by_its_own_statistics() -> None:
    model = grouped()
    raw = torch.stack([model(torch.tensor([ids])).logits[0] for ids in ([1, 5, 6, 8, 9, 2], [1, 5, 6, 10, 2])])
    expected = (raw.double() - torch.tensor([0.5, -2.0])) / torch.tensor([2.0, 0.25])
    found = ScalarModel(model)(BATCH)[:2].flatten().tolist()
    assert found == pytest.approx(expected.flatten().tolist(), rel=1e-6)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]])
def test_folding_is_the_weighted_sum_of_normalized_heads(weights: list[float]) -> None:
    expected = ScalarModel(grouped())(BATCH) @ torch.tensor(weights)
    model = fold(grouped(), weights)
    assert model.num_labels == model.config.num_labels == 1
    assert heads(model.config) == []
    assert ScalarModel(model)(BATCH).tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)


def test_a_folder_keeps_the_heads_and_plain_transformers_reads_them(tmp_path: Path) -> None:
    folder = start(tmp_path)
    model = with_heads(lambda: load_scalar_model(folder), ["old", "young"])
    model.config.reward_mean, model.config.reward_std = [1.0, 2.0], [3.0, 4.0]
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "rm")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert plain.config.id2label == {0: "old", 1: "young"}
    assert plain.config.label2id == {"old": 0, "young": 1}
    again = load_scalar_model(str(tmp_path / "rm"), trained=True)
    assert torch.equal(again.score.weight, model.score.weight)  # type: ignore[union-attr]
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(plain(ids).logits, again.eval()(ids).logits)
    assert plain(ids).logits.shape == (1, 2)
    assert torch.equal(with_heads(lambda: again, ["old", "young"]).score.weight, model.score.weight)
    for names in (None, ["young", "old"]):
        with pytest.raises(UserError, match=r"has heads for the groups old, young: reward.groups=\[old,young\]"):
            with_heads(lambda: again, names)


@quiet_lightning
def test_an_adapter_keeps_the_heads(tmp_path: Path) -> None:
    folder = start(tmp_path)
    data = PreferenceData(load_tokenizer(folder), preferences(8), batch_size=8, cache_dir=tmp_path)
    module = RewardModel(
        partial(load_scalar_model, folder), adam(), lora={"export": "adapter"}, groups=["old", "young"]
    )
    fit(module, data, 2)
    write_model(tmp_path / "adapter", module.export_model(), data.tokenizer, {})
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    again = load_scalar_model(str(tmp_path / "adapter"), trained=True)
    assert heads(again.config) == ["old", "young"]
    batch = next(iter(data.train_dataloader())).pack()
    module.scorer.model.config.reward_mean = again.config.reward_mean
    module.scorer.model.config.reward_std = again.config.reward_std
    with torch.no_grad():
        assert torch.allclose(ScalarModel(again.eval())(batch), module.eval().scorer(batch), atol=1e-5)


def test_statistics_of_another_number_of_heads_are_refused(tmp_path: Path) -> None:
    model = with_heads(lambda: load_scalar_model(start(tmp_path)), ["old", "young"])
    model.config.reward_std = [1.0]
    model.save_pretrained(tmp_path / "rm")
    with pytest.raises(UserError, match="reward_mean and reward_std need a number for each of num_labels heads"):
        load_scalar_model(str(tmp_path / "rm"), trained=True)


@pytest.mark.parametrize("names", ["old", [], ["old", "old"], ["mean"], ["worst", "old"]])
def test_names_that_cannot_be_are_refused(names: object) -> None:
    with pytest.raises(UserError, match="reward.groups="):
        check_names(names)  # type: ignore[arg-type]
