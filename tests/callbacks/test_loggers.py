"""What the HParams tab shows of a run."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from rlhf_lightning.callbacks.loggers import CHARTS, judged_by, quiet_writer_threads, write_charts, write_hparams
from rlhf_lightning.errors import UserError
from rlhf_lightning.files import readable_os_errors
from tests.helpers.lightning import quiet_lightning


class Small(LightningModule):
    """Logs a falling loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("val/loss", 1.0 / (1 + self.global_step))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(4, 1))


def train(folder: Path) -> Trainer:
    logger = TensorBoardLogger(str(folder), name="", version="tensorboard", default_hp_metric=False)
    trainer = Trainer(
        max_steps=4, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(Small())
    return trainer


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


@quiet_lightning
def test_hparams_tab_has_the_settings_and_the_final_metric(tmp_path: Path) -> None:
    given = {"optimizer.lr": 0.1, "stage": "sft", "lora": None, "packed": True, "betas": [0.9, 0.99], "steps": 3}
    trainer = train(tmp_path)
    write_hparams(trainer, given, "val/loss", 0.25)
    events = read(tmp_path)
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    shown = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert shown == {
        "optimizer.lr": 0.1, "stage": "sft", "lora": "None", "packed": True, "betas": "[0.9, 0.99]", "steps": 3,
    }  # fmt: skip
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    listed = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos
    assert [info.name.tag for info in listed] == ["hparams/val/loss"]  # TensorBoard shows only metrics listed here
    assert [event.value for event in events.Scalars("hparams/val/loss")] == [pytest.approx(0.25)]
    assert "hp_metric" not in events.Tags()["scalars"]


@quiet_lightning
def test_hparams_without_a_metric_writes_nothing(tmp_path: Path) -> None:
    write_hparams(train(tmp_path), {"a": 1}, None, 0.0)
    assert not [tag for tag in read(tmp_path).summary_metadata if tag.startswith("_hparams_")]


@quiet_lightning
def test_custom_scalars_group_what_belongs_together(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    write_charts(trainer)
    trainer.logger.finalize("success")
    (stored,) = read(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(stored.tensor_proto.string_val[0])
    (category,) = layout.category
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert len(charts) == len(CHARTS)
    assert charts["reward: reward/proxy, reward/gold"] == ["^reward/proxy$", "^reward/gold$"]


def test_a_run_without_held_out_rows_is_judged_by_its_training() -> None:
    assert judged_by("val/reward", {"val/reward": 1, "reward/proxy": 2}) == "val/reward"
    assert judged_by("val/reward", {"reward/proxy": 2}) == "reward/proxy"
    assert judged_by("val/accuracy", {"train/accuracy": 2}) == "train/accuracy"
    assert judged_by("kl", {"train/loss": 2}) is None


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOSPC])
def test_a_disk_that_refuses_ends_the_writer_without_a_traceback(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard writes in a thread of its own, which would print; its error is raised where the run goes on."""

    def refuse(self: RecordWriter, data: bytes) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    quiet_writer_threads()
    monkeypatch.setattr(RecordWriter, "write", refuse)
    told = pytest.raises(UserError, match=f"cannot write .*run: {os.strerror(number)}")
    with told, readable_os_errors(tmp_path / "run"):
        writer = SummaryWriter(str(tmp_path / "run"))
        for step in range(10_000):
            writer.add_scalar("train/loss", 1.0, step)
    assert "Traceback" not in capfd.readouterr().err


def test_what_ends_another_thread_is_still_printed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    quiet_writer_threads()
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    assert "ZeroDivisionError" in capfd.readouterr().err
