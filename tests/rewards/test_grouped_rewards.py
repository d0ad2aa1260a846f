"""Rewards of groups: their combination by hand, in every place that takes a reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.completion import ScalarModel
from rlhf_lightning.models.heads import with_heads
from rlhf_lightning.models.loading import load_scalar_model, load_tokenizer
from rlhf_lightning.ops.groups import Group, pack
from rlhf_lightning.rewards.groups import combined, group_weights, load_critic
from rlhf_lightning.rewards.scoring import load_reward, score, score_groups
from rlhf_lightning.world import gold_reward, group_value, rows
from tests.modules.offline import start

PARTS = {"a": torch.tensor([1.0, -2.0, 0.5]), "b": torch.tensor([3.0, 2.0, -1.5])}
TEXTS: tuple[Any, ...] = (["name red", "name red", "name blue"], ["gold", "red gold", "lime"], [{}, {}, {}])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [2.0, 0.0, -0.5]),
        ("worst", [1.0, -2.0, -1.5]),
        ({"a": 0.2, "b": 0.8}, [2.6, 1.2, -1.1]),
        ({"a": 1, "b": 4}, [2.6, 1.2, -1.1]),  # weights are shares
        ({"b": 3.0}, [3.0, 2.0, -1.5]),
    ],
)
def test_combinations_by_hand(how: Any, expected: list[float]) -> None:
    assert combined(PARTS, how).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("wurst", "reward_groups='wurst' is not mean, worst or .* Did you mean 'worst'"),
        ({"c": 1}, "reward_groups.c: the reward has the groups a, b"),
        ({"a": -1}, "reward_groups.a=-1 is not a number of at least 0"),
        ({"a": 0}, "gives no group a weight above 0"),
        (None, "reward_groups=None is not mean, worst"),
    ],
)
def test_combinations_that_cannot_be_are_told(how: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        group_weights(how, ["a", "b"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward model with two heads and their statistics."""
    root = tmp_path_factory.mktemp("grouped")
    lm = start(root)
    model = with_heads(lambda: load_scalar_model(lm), ["a", "b"])
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    model.config.reward_mean, model.config.reward_std = [0.25, -1.0], [2.0, 0.5]
    model.save_pretrained(root / "rm")
    load_tokenizer(lm).save_pretrained(root / "rm")
    return str(root / "rm")


@pytest.mark.parametrize("how", ["mean", "worst", {"a": 1, "b": 3}])
def test_a_folder_with_heads(folder: str, how: Any) -> None:
    reward = load_reward(folder, how=how)
    found = score_groups(reward, *TEXTS)
    assert list(found) == ["", "a", "b"]
    assert not torch.allclose(found["a"], found["b"])
    assert torch.equal(found[""], combined({"a": found["a"], "b": found["b"]}, how))
    assert torch.equal(score(reward, *TEXTS), found[""])
    single = score(load_reward(folder, how={"a": 1}), *TEXTS)
    assert torch.allclose(found["a"], single)


def test_a_map_is_a_reward_for_each_group() -> None:
    """Such as a reward model of its own, as in MaxMin-RLHF."""
    reward = load_reward({"short": shorter, "long": longer}, how="worst")
    found = score_groups(reward, *TEXTS)
    assert found["short"].tolist() == [-4.0, -8.0, -4.0]
    assert found[""].tolist() == [-4.0, -8.0, -4.0]
    assert score_groups(shorter, *TEXTS).keys() == {""}


def shorter(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [-float(len(response)) for response in responses]


def longer(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float(len(response)) for response in responses]


def test_the_world_has_a_gold_reward_for_each_group() -> None:
    metadata = list(rows("prompts", 40))
    texts = [row["ideal"] for row in metadata[:20]] + ["Sure."] * 20
    prompts = [row["prompt"] for row in metadata]
    reward = load_reward({"cautious": "world:cautious", "curious": "world:curious"})
    found = score_groups(reward, prompts, texts, metadata)
    for name in ("cautious", "curious"):
        expected = [group_value(row, text, name) for row, text in zip(metadata, texts, strict=True)]
        assert found[name].tolist() == pytest.approx(expected)
    assert score(load_reward("world:balanced"), prompts, texts, metadata).tolist() == pytest.approx(
        gold_reward(prompts, texts, metadata)
    )
    measured = reward.measures(metadata[0], texts[0])  # type: ignore[attr-defined]
    assert "correct" in measured
    assert not any(name.startswith("gold") for name in measured)
    with pytest.raises(UserError, match="world:'cautius' is not one of .* Did you mean 'cautious'"):
        load_reward("world:cautius")


@pytest.mark.parametrize("how", ["worst", {"a": 1}])
def test_a_reward_without_groups_has_nothing_to_combine(how: Any, tmp_path: Path) -> None:
    for reward in (shorter, "world", ["world", "world:eager"]):
        with pytest.raises(UserError, match=r"has no groups; a reward model gets them with reward\.groups"):
            load_reward(reward, how=how)


@pytest.mark.parametrize(
    ("how", "weights"), [("mean", [0.5, 0.5]), ({"a": 1, "b": 3}, [0.25, 0.75]), ("worst", [0.5, 0.5])]
)
def test_a_critic_starts_as_the_combination_of_the_heads(folder: str, how: Any, weights: list[float]) -> None:
    batch = pack([Group([5, 6, 7], [[8, 9], [10]])])
    with torch.no_grad():
        expected = ScalarModel(load_scalar_model(folder, trained=True))(batch) @ torch.tensor(weights)
        found = ScalarModel(load_critic(folder, how))(batch)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
