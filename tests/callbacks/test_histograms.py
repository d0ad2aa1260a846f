"""The histograms of a rollout: their values are the rollout's, and every logger gets what it can show."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_lightning import OnlineDPO
from rlhf_lightning.callbacks.histograms import Histograms, distributions
from rlhf_lightning.callbacks.loggers import log_histogram, log_image, takes_images
from rlhf_lightning.errors import UserError
from rlhf_lightning.modules.rollout import Rollout
from tests.helpers.lightning import quiet_lightning
from tests.modules import bandit

TAGS = {"histograms/advantage", "histograms/kl_by_position", "histograms/length", "histograms/reward"}


class Kept(Callback):
    """Keeps the rollout of every iteration."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.rollouts.append(pl_module.last_rollout)


def train(folder: Path, module: Any, iterations: int, every: int) -> tuple[EventAccumulator, list[Rollout]]:
    """Train and return what TensorBoard got, and the rollouts."""
    kept = Kept()
    logger = TensorBoardLogger(str(folder), name="", version="", default_hp_metric=False)
    trainer = bandit.Trainer(
        max_epochs=1, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, num_sanity_val_steps=0,
        callbacks=[Histograms(every), kept],
    )  # fmt: skip
    trainer.fit(module, bandit.Prompts(iterations, val=True))
    return EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload(), kept.rollouts


@pytest.mark.slow
@quiet_lightning
def test_the_histograms_are_of_the_rollouts_at_the_steps_of_the_scalars(tmp_path: Path) -> None:
    module = bandit.build(lr=0.1, missing_eos_penalty=1.0, num_generations=2)
    events, rollouts = train(tmp_path, module, iterations=5, every=3)
    assert set(events.Tags()["histograms"]) == TAGS
    scalars = {event.step: event.value for event in events.Scalars("reward/proxy")}
    kls = {event.step: event.value for event in events.Scalars("kl/reference")}
    for tag in TAGS:
        assert [event.step for event in events.Histograms(tag)] == [0, 3, 4]  # every third, and the last
    for place, step in enumerate((0, 3, 4)):
        rollout = rollouts[step]
        reward, advantage, length, kl = (
            events.Histograms(f"histograms/{name}")[place].histogram_value
            for name in ("reward", "advantage", "length", "kl_by_position")
        )
        responses, tokens = len(rollout.scores), int(rollout.mask.sum())
        assert reward.num == responses == pytest.approx(sum(reward.bucket))
        assert reward.sum / responses == pytest.approx(scalars[step], abs=1e-6)
        assert sum(advantage.bucket) == pytest.approx(tokens)
        advantages = rollout.tokens["advantages"][rollout.mask]
        assert advantage.sum == pytest.approx(advantages.sum().item(), abs=1e-4)
        assert advantage.sum_squares == pytest.approx((advantages**2).sum().item(), rel=1e-4)
        assert advantage.min == pytest.approx(advantages.min().item())
        assert advantage.bucket_limit[-1] == pytest.approx(advantages.max().item())
        assert length.sum == tokens
        widths = np.diff([length.min, *length.bucket_limit])
        assert widths == pytest.approx(1.0)  # a length each
        lengths = np.bincount(rollout.mask.sum(1).numpy())
        assert length.bucket[-1] == pytest.approx(lengths[-1])
        assert sum(kl.bucket) == pytest.approx(kls[step], abs=0.02)  # but for negative estimates
        heights = (rollout.tokens["old_logprobs"] - rollout.tokens["ref_logprobs"]).sum(0) / responses
        assert list(kl.bucket) == pytest.approx(heights.clamp_min(0.0).tolist(), abs=1e-6)
        assert list(kl.bucket_limit) == [position + 1.5 for position in range(len(heights))]
    assert kl.num > 0.1  # the policy has moved: not zeros that are compared


@pytest.mark.slow
@quiet_lightning
def test_online_dpo_has_no_advantages_and_a_stage_without_rollouts_nothing(tmp_path: Path) -> None:
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    module = OnlineDPO(bandit.load, optimizer, reward=bandit.good_share, max_new_tokens=4)
    events, _ = train(tmp_path, module, iterations=1, every=1)
    assert set(events.Tags()["histograms"]) == TAGS - {"histograms/advantage"}
    events, _ = train(tmp_path / "off", bandit.build(), iterations=1, every=0)
    assert events.Tags()["histograms"] == []


def test_the_distributions_of_a_rollout_by_hand() -> None:
    rollout = bandit.two_responses(bandit.build())
    rollout.tokens["kl"] = torch.tensor([[1.0, -0.5, 0.0], [0.0, 2.0, -1.0]])
    found = distributions(rollout)
    assert found.keys() == {"reward", "length", "kl_by_position"}
    assert found["reward"][0].tolist() == [1.0, -2.0]
    assert found["length"][0].tolist() == [2, 3]
    positions, kl = found["kl_by_position"]
    assert positions.tolist() == [1, 2, 3]
    assert kl is not None
    assert kl.tolist() == [0.5, 0.75, 0.0]


def test_a_number_of_iterations_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match=r"callbacks.histograms.every_n_iterations=-1"):
        Histograms(-1)


# ---- other loggers -----------------------------------------------------------------------------------------------------


class Written(WandbLogger):
    """W&B without its package: keeps what it is given."""

    def __init__(self) -> None:
        self.metrics: list[Any] = []
        self.images: list[Any] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics.append((metrics, step))

    def log_image(self, key: str, images: list[Any], step: int | None = None, **_: Any) -> None:
        self.images.append((key, images, step))


class Artifacts(MLFlowLogger):
    """MLflow without its package: keeps what its client is given."""

    run_id: Any = "r"

    def __init__(self) -> None:
        self.given: list[Any] = []

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(log_image=lambda *arguments: self.given.append(arguments))


def test_wandb_gets_histograms_and_wandb_and_mlflow_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Histogram=lambda np_histogram: np_histogram))
    wandb, mlflow = Written(), Artifacts()
    log_histogram(wandb, "histograms/length", np.array([2, 4, 4]), 7)
    (((name, (heights, edges)), step),) = [(*given.items(), step) for given, step in wandb.metrics]
    assert (name, step) == ("histograms/length", 7)
    assert heights.tolist() == [1, 0, 2]
    assert edges.tolist() == [1.5, 2.5, 3.5, 4.5]
    image = np.zeros((2, 3, 3), np.uint8)
    for logger in (wandb, mlflow):
        log_image(logger, "figures/lengths", image, 0)
    assert wandb.images == [("figures/lengths", [image], 0)]
    assert mlflow.given == [("r", image, "figures/lengths/step_000000.png")]


def test_long_responses_share_bins() -> None:
    wandb = Written()
    positions = np.arange(1, 1025)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", SimpleNamespace(Histogram=lambda np_histogram: np_histogram))
        log_histogram(wandb, "histograms/kl_by_position", positions, 0, np.full(1024, 0.5))
    heights, edges = wandb.metrics[0][0]["histograms/kl_by_position"]
    assert len(heights) == 64
    assert heights == pytest.approx(8.0)  # 16 positions each
    assert (edges[0], edges[-1]) == (0.5, 1024.5)


@quiet_lightning
def test_a_logger_that_takes_neither_is_left_alone(tmp_path: Path) -> None:
    logger: Logger = CSVLogger(str(tmp_path), name="", version="csv")
    assert not takes_images(logger)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_histogram(logger, "histograms/length", np.array([2, 4]), 0)
        log_image(logger, "figures/lengths", np.zeros((2, 3, 3), np.uint8), 0)
    log_histogram(Artifacts(), "histograms/length", np.array([2, 4]), 0)
    assert not list(tmp_path.rglob("*"))
