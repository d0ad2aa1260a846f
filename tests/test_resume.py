"""A run killed between any two steps and resumed ends bit-equal to one that was not, for every module."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from rlhf_lightning import DPO, PPO, SFT, DemonstrationData, OnlineDPO, PreferenceData, PromptData, RewardModel
from rlhf_lightning.callbacks.checkpoints import AtomicCheckpointIO, RandomState, StepCheckpoint
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer
from rlhf_lightning.models.sharding import whole_state
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.modules.schedules import schedule
from rlhf_lightning.runtime.strategies import ShardedStrategy
from rlhf_lightning.world import gold_reward, rows
from tests.helpers.lightning import quiet_lightning

DATA = {
    "sft": DemonstrationData,
    "reward": PreferenceData,
    "grouped": PreferenceData,
    "dpo": PreferenceData,
    "qlora": PreferenceData,
    "ppo": PromptData,
    "online_dpo": PromptData,
}


class Killed(Exception):
    """Stands for a killed process."""


class Kill(Callback):
    """Dies after the checkpoint of the given number of updates was written, before the next batch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= self.step:
            raise Killed


def build_start(folder: Path) -> str:
    texts = (message["content"] for row in rows("demonstrations", 200) for message in row["messages"])
    return build_tiny(folder, texts, vocab_size=300, hidden_size=32, layers=2, heads=2)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_start(tmp_path_factory.mktemp("start") / "model")


def build(stage: str, start: str, cache: Path) -> tuple[LightningModule, Any]:
    data = DATA[stage](
        load_tokenizer(start), "world", batch_size=4, row_tokens=128, cache_dir=cache,
        world={"rows": 14, "labeller": {"group": {"cautious": 1, "curious": 1}}},
    )  # fmt: skip
    common: dict[str, Any] = {
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
        "schedule": partial(schedule, warmup=2),
    }
    lm = partial(load_causal_lm, start, dropout=0.1 if stage == "sft" else 0.0)
    build_module: dict[str, Callable[[], LightningModule]] = {
        "sft": lambda: SFT(lm, **common),
        "reward": lambda: RewardModel(partial(load_scalar_model, start, dropout=0.1), **common),
        "grouped": lambda: RewardModel(
            partial(load_scalar_model, start, dropout=0.1), groups=["cautious", "curious"], **common
        ),
        "dpo": lambda: DPO(lm, **common),
        "qlora": lambda: DPO(lm, lora={"r": 4, "quantization": "nf4"}, **common),
        "ppo": lambda: PPO(
            lm, reward=gold_reward, max_new_tokens=8, ppo_epochs=2, kl_target=1.0, kl_horizon=20, reward_scale=True,
            **common,
        ),
        "online_dpo": lambda: OnlineDPO(lm, reward=gold_reward, max_new_tokens=8, num_minibatches=2, **common),
    }  # fmt: skip
    return build_module[stage](), data


def run(
    stage: str,
    start: str,
    folder: Path,
    kill: int | None,
    accumulate: int,
    resume: bool,
    strategy: Any = "auto",
    device: str = "cpu",
) -> LightningModule:
    seed_everything(5, verbose=False)
    if resume:
        torch.rand(17)  # another process would not be at the same random state
    module, data = build(stage, start, folder / "cache")
    callbacks: list[Callback] = [StepCheckpoint(folder, every_n_steps=1), RandomState()]
    callbacks += [Kill(kill)] if kill is not None else []
    trainer = Trainer(
        max_steps=8, max_epochs=-1, accelerator=device, logger=False, enable_checkpointing=False, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False, accumulate_grad_batches=accumulate, strategy=strategy, devices=1,
    )  # fmt: skip
    last = folder / "last.ckpt"
    trainer.fit(module, data, ckpt_path=str(last) if resume else None)
    assert trainer.global_step == 8
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "accumulate", "kills"),
    [
        ("sft", 1, [3]),
        ("sft", 2, [1, 2, 5]),
        ("reward", 1, [4, 6]),
        ("grouped", 2, [3]),
        ("dpo", 2, [3, 4]),
        ("qlora", 2, [3]),
        ("ppo", 1, [2, 6]),
        ("ppo", 1, [4]),
        ("online_dpo", 1, [4]),
    ],
)
@quiet_lightning
def test_resumed_equals_uninterrupted(
    stage: str, accumulate: int, kills: list[int], start: str, tmp_path: Path
) -> None:
    if stage == "qlora":
        pytest.importorskip("bitsandbytes")
    whole = run(stage, start, tmp_path / "whole", None, accumulate, resume=False)
    for number, kill in enumerate(kills):
        with pytest.raises(Killed):
            run(stage, start, tmp_path / "parts", kill, accumulate, resume=number > 0)
    resumed = run(stage, start, tmp_path / "parts", None, accumulate, resume=True)
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    if stage in ("reward", "grouped"):
        assert whole.moments == resumed.moments
    if stage == "ppo":
        assert (whole.kl.beta, whole.reward_moments) == (resumed.kl.beta, resumed.reward_moments)  # type: ignore[union-attr]
        assert whole.kl.beta != 0.05  # type: ignore[union-attr]  # the controller did move
        assert whole.samples_seen == resumed.samples_seen


@pytest.mark.slow
@quiet_lightning
def test_checkpoint_holds_tensors_and_primitives_only(start: str, tmp_path: Path) -> None:
    run("dpo", start, tmp_path, None, 1, resume=False)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    policy = {name for name in checkpoint["state_dict"] if name.startswith("policy.")}
    assert policy == set(checkpoint["state_dict"])  # no reference, nothing frozen
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
@quiet_lightning
@pytest.mark.parametrize("stage", ["dpo", pytest.param("ppo", marks=pytest.mark.nightly)])
def test_shards_resume_bit_equal_and_go_on_under_another_strategy(
    stage: str, start: str, tmp_path: Path, one_rank: None, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(stage, start, tmp_path / "one", None, 1, resume=False).state_dict()
    for name, strategy in (("sharded", ShardedStrategy), ("auto", lambda: "auto")):
        with pytest.raises(Killed):
            run(stage, start, tmp_path / name, 3, 1, resume=False, strategy=strategy())
    files = {path.name for path in (tmp_path / "sharded").iterdir()}
    (shards,) = files - {"last.ckpt", "cache"}
    assert shards.endswith(".shards")
    shutil.copytree(tmp_path / "sharded", tmp_path / "single")
    for name, strategy in (("sharded", ShardedStrategy()), ("auto", ShardedStrategy()), ("single", "auto")):
        found = run(stage, start, tmp_path / name, None, 1, resume=True, strategy=strategy)
        weights = found.state_dict() if strategy == "auto" else whole_state(found)
        assert weights.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(weights[key], value), (name, key)
        exported = found.export_model().state_dict()
        prefix = "policy.lm."
        assert all(torch.equal(exported[key.removeprefix(prefix)], weights[key]) for key in weights if prefix in key)
    assert {path.name for path in (tmp_path / "single").iterdir()} == {"last.ckpt", "cache"}  # no shards are left
    assert len(list((tmp_path / "sharded").glob("*.shards"))) == 1
    whole = type(found).load_from_checkpoint(
        tmp_path / "sharded" / "last.ckpt", load=found.load, optimizer=found.make_optimizer,
        **({"reward": gold_reward} if stage == "ppo" else {}),
    )  # fmt: skip
    for key, value in whole.state_dict().items():
        assert torch.equal(value, expected[key]), key
