"""A user's own LightningDataModule or DataLoader that yields groups, with every module; anything else is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from rlhf_lightning import DPO, PPO, SFT, DemonstrationData, Group, GroupBatch, OnlineDPO, RewardModel, pack
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from tests.helpers.lightning import quiet_lightning
from tests.modules.bandit import Ids
from tests.modules.offline import classifier, demonstrations, lm, sgd, start

DEMONSTRATIONS = [Group([1, 5 + i % 3], [[6, 7 + i % 2, 2]]) for i in range(8)]
PAIRS = [Group([1, 5 + i % 3], [[6, 2], [7, 8, 2]]) for i in range(8)]
PROMPTS = [Group([1, 5 + i % 3], []) for i in range(8)]


class Mine(LightningDataModule):
    """Nothing but two loaders."""

    def __init__(self, rows: list[Any], collate: Any = list) -> None:
        super().__init__()
        self.rows_of_mine, self.collate = rows, collate

    def train_dataloader(self) -> Any:
        return DataLoader(self.rows_of_mine, batch_size=4, collate_fn=self.collate)

    val_dataloader = train_dataloader


def fit(module: Any, data: Any, **options: Any) -> dict[str, float]:
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, **options,
    )  # fmt: skip
    trainer.fit(module, data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def length(prompts: list[str], responses: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    assert all(prompt.startswith("1 ") for prompt in prompts)
    assert all("finished" in row for row in metadata)
    return [float(len(text.split())) for text in responses]


def ppo(**options: Any) -> PPO:
    return PPO(lm, sgd(), reward=length, template=Ids(), max_new_tokens=4, **options)


MODULES: dict[str, tuple[Any, list[Group], set[str]]] = {
    "sft": (lambda: SFT(lm, sgd()), DEMONSTRATIONS, {"train/loss", "val/loss"}),
    "reward": (lambda: RewardModel(classifier, sgd()), PAIRS, {"train/accuracy", "val/accuracy"}),
    "dpo": (lambda: DPO(lm, sgd()), PAIRS, {"train/accuracy", "val/accuracy"}),
    "ppo": (ppo, PROMPTS, {"reward/proxy", "val/reward"}),
    "rloo": (lambda: ppo(estimator="rloo", num_generations=2), PROMPTS, {"reward/proxy", "val/reward"}),
    "grpo": (lambda: ppo(estimator="grpo", num_generations=2), PROMPTS, {"reward/proxy", "val/reward"}),
    "online_dpo": (
        lambda: OnlineDPO(lm, sgd(), reward=length, template=Ids(), max_new_tokens=4),
        PROMPTS,
        {"policy/accuracy", "val/reward"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", MODULES)
@quiet_lightning
def test_lists_of_groups_work_with_every_module(stage: str) -> None:
    make, rows, metrics = MODULES[stage]
    assert metrics <= fit(make(), Mine(rows)).keys()


@quiet_lightning
def test_a_plain_loader_and_packed_batches_give_what_lists_give() -> None:
    lists = fit(SFT(lm, sgd()), Mine(DEMONSTRATIONS))
    loader = fit(SFT(lm, sgd()), DataLoader(DEMONSTRATIONS, batch_size=4, collate_fn=list))
    packed = fit(SFT(lm, sgd()), Mine(DEMONSTRATIONS, pack))
    assert lists["train/loss"] == loader["train/loss"] == packed["train/loss"]


@quiet_lightning
def test_double_precision_leaves_groups_alone() -> None:
    assert fit(SFT(lm, sgd()), Mine(DEMONSTRATIONS), precision="64-true")["train/loss"] > 0


@pytest.mark.slow
@quiet_lightning
def test_every_prompt_of_a_step_draws_its_own_tokens() -> None:
    module = ppo(num_generations=1, seed=3)
    fit(module, Mine([Group([1, 5], [])] * 4))
    assert len({row["response"] for row in module.samples_seen}) > 1


@pytest.mark.parametrize(
    ("make", "rows", "message"),
    [
        (MODULES["sft"][0], [{"a": 1}] * 4, "the loader yields list of dict; SFT takes a list of Group"),
        (MODULES["dpo"][0], [torch.zeros(2)] * 4, "the loader yields list of Tensor; DPO takes a list of Group"),
        (
            MODULES["sft"][0],
            PROMPTS,
            r"SFT needs at least 1 response\(s\) per prompt; the loader yields a group with 0",
        ),
        (MODULES["dpo"][0], DEMONSTRATIONS, r"DPO needs at least 2 response\(s\) per prompt"),
        (MODULES["reward"][0], DEMONSTRATIONS, r"RewardModel needs at least 2 response\(s\) per prompt"),
        (MODULES["sft"][0], [Group([1], [[9999]])] * 4, "the token id 9999, but the model has 64 ids"),
        (lambda: PPO(lm, sgd(), reward=length), PROMPTS, r"PPO\(template=Template\(tokenizer\)\) is needed"),
    ],
)
@quiet_lightning
def test_what_cannot_be_learned_from_is_refused(make: Any, rows: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(make(), Mine(rows))


@pytest.mark.slow
@quiet_lightning
def test_demonstrations_are_not_taken_for_preferences(tmp_path: Any) -> None:
    folder = start(tmp_path)
    data = DemonstrationData(load_tokenizer(folder), demonstrations(8), batch_size=4, cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"DPO needs at least 2 response\(s\) per prompt"):
        fit(DPO(lambda: load_causal_lm(folder), sgd()), data)


def test_a_packed_batch_does_not_fit_a_model_that_needs_padded_rows() -> None:
    module = SFT(lm, sgd())
    module.layout = "padded"
    batch = pack(DEMONSTRATIONS)
    assert isinstance(batch, GroupBatch)
    with pytest.raises(UserError, match="this model needs padded rows"):
        module.pack(batch)
