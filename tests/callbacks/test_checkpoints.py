"""Checkpoints are whole, load without running code, and continue exactly where training was."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rlhf_lightning.callbacks.checkpoints import (
    AtomicCheckpointIO,
    RandomState,
    StepCheckpoint,
    kept_microbatches,
)
from rlhf_lightning.callbacks.stop import Stop
from rlhf_lightning.callbacks.throughput import Throughput
from rlhf_lightning.errors import UserError
from tests.helpers.lightning import quiet_lightning


class Dropped(LightningModule):
    """A regression with dropout that also draws from Python and NumPy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        noise = random.random() + float(np.random.standard_normal())
        return (self.net(batch[0]).sum() - noise) ** 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Resumable(DataLoader):
    """Twelve batches in a fixed order that continue from a saved position."""

    def __init__(self) -> None:
        rows = torch.arange(48.0).view(12, 4) / 48
        super().__init__(TensorDataset(rows), batch_size=1)
        self.place = self.start = 0

    def __iter__(self) -> Any:
        first, self.start = self.start, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= first:
                self.place = number + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["place"]


class Die(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def train(folder: Path, *extra: Callback, start: int = 0, accumulate: int = 1, every: int = 1, steps: int = 10) -> Any:
    """Train `Dropped`; `start` seeds the process, which a resumed one does not share with the first."""
    seed(start)
    module, last = Dropped(), folder / "last.ckpt"
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, plugins=[AtomicCheckpointIO()], accumulate_grad_batches=accumulate,
        callbacks=[*extra, StepCheckpoint(folder, every), RandomState()],
    )  # fmt: skip
    trainer.fit(module, Resumable(), ckpt_path=str(last) if last.exists() else None)
    return torch.cat([p.detach().flatten() for p in module.parameters()]), trainer


@quiet_lightning
def test_dropout_and_all_libraries_continue_after_two_kills_in_one_epoch(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole")
    for number, step in enumerate((2, 4), 1):
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "parts", Die(step), start=number * 99 * (number > 1))
    resumed, trainer = train(tmp_path / "parts", start=7)
    assert trainer.global_step == 10
    assert torch.equal(whole, resumed)


@quiet_lightning
def test_a_checkpoint_says_how_many_microbatches_a_step_has(tmp_path: Path) -> None:
    train(tmp_path, accumulate=2, steps=2)
    assert kept_microbatches(tmp_path / "last.ckpt") == 2


@quiet_lightning
def test_the_random_state_matters(tmp_path: Path) -> None:
    """Guards the test above: without the restored state the same kill ends elsewhere."""
    whole, _ = train(tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "parts", Die(3))
    path = tmp_path / "parts" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"].pop("RandomState")
    torch.save(checkpoint, path)
    assert not torch.equal(whole, train(tmp_path / "parts", start=7)[0])


def test_random_state_is_restored_at_the_first_batch_only() -> None:
    seed(11)
    saved = RandomState().state_dict()
    expected = (random.random(), np.random.standard_normal(), torch.rand(3).tolist())
    callback: Any = RandomState()
    callback.load_state_dict(saved)
    seed(5)
    trainer = SimpleNamespace(is_global_zero=True, global_rank=0, strategy=None)
    callback.on_train_batch_start(trainer, None, None, 0)
    assert (random.random(), np.random.standard_normal(), torch.rand(3).tolist()) == expected
    callback.on_train_batch_start(trainer, None, None, 1)
    assert torch.rand(3).tolist() != expected[2]


@pytest.mark.parametrize(("rank", "together", "expected"), [(0, 1, 0), (1, 1, 1), (2, 1, 0), (1, 2, 0), (3, 2, 0)])
def test_every_rank_goes_on_from_its_own_random_state(rank: int, together: int, expected: int) -> None:
    """With more ranks than before some share a state, and so do ranks that share every layer."""
    states = []
    for value in (1, 2):
        seed(value)
        states += RandomState().state_dict()["states"]
    callback: Any = RandomState()
    callback.load_state_dict({"ranks": callback.ranks, "states": states})
    strategy = SimpleNamespace(tensor_parallel_size=together)
    trainer = SimpleNamespace(is_global_zero=rank == 0, global_rank=rank, strategy=strategy)
    callback.on_train_batch_start(trainer, None, None, 0)
    found = torch.rand(3)
    seed(1 + expected)
    assert torch.equal(found, torch.rand(3))


@quiet_lightning
@pytest.mark.parametrize("microbatch", [3, 4, 5])
def test_stopping_inside_an_accumulation_window_loses_nothing(microbatch: int, tmp_path: Path) -> None:
    class Signal(Callback):
        seen = 0

        def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
            self.seen += 1
            if self.seen == microbatch:
                stop.received = 15  # as on SIGTERM, without one

    whole, _ = train(tmp_path / "whole", accumulate=3, steps=4)
    stop = Stop()
    stop.on_train_start = lambda *args: None  # type: ignore[method-assign]  # no handlers in a test
    _, stopped = train(tmp_path / "parts", stop, Signal(), accumulate=3, steps=4, every=50)
    assert stopped.global_step == (microbatch + 2) // 3  # the window is finished first, then saved
    resumed, _ = train(tmp_path / "parts", start=7, accumulate=3, steps=4, every=50)
    assert torch.equal(whole, resumed)


@quiet_lightning
@pytest.mark.parametrize(("place", "validated"), [("train", 0), ("validation", 1)])
def test_no_validation_keeps_a_stopped_run_alive(place: str, validated: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Validated(Dropped):
        batches = 0

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.batches += 1

        def val_dataloader(self) -> Any:
            return DataLoader(TensorDataset(torch.zeros(6, 4)), batch_size=1)

    class Signal(Callback):
        def on_train_batch_start(self, *rest: Any) -> None:
            stop.received = 15 if place == "train" else None

        def on_validation_start(self, *rest: Any) -> None:
            stop.received = 15

    stop, module = Stop(), Validated()
    stop.on_train_start = lambda *args: None  # type: ignore[method-assign]
    monkeypatch.setattr(signal, "signal", lambda *args: None)  # Lightning switches Ctrl-C off when it is interrupted
    trainer = Trainer(
        max_steps=12, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=4, callbacks=[stop, Signal()],
    )  # fmt: skip
    ended = pytest.raises(SystemExit) if place == "validation" else nullcontext()
    with ended:
        trainer.fit(module, Resumable())
    assert module.batches == validated
    assert trainer.global_step == (1 if place == "train" else 4)


@quiet_lightning
@pytest.mark.parametrize("received", [None, 15])
def test_another_callbacks_stop_inside_a_window_is_not_saved(received: int | None, tmp_path: Path) -> None:
    class Halt(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            trainer.should_stop = batch_idx == 4
            stop.received = received if batch_idx == 4 else None

    stop = Stop()
    stop.on_train_start = lambda *args: None  # type: ignore[method-assign]
    train(tmp_path, stop, Halt(), accumulate=3, steps=4, every=50)
    assert not (tmp_path / "last.ckpt").exists()


@quiet_lightning
@pytest.mark.parametrize(("every", "during", "end"), [(1, 9, 10), (4, 8, 10), (50, None, 10), (0, None, None)])
def test_checkpoint_period(every: int, during: int | None, end: int | None, tmp_path: Path) -> None:
    """One every n updates, and one at the end, with which a run that is killed in its export need not train again."""

    def saved() -> int | None:
        last = tmp_path / "last.ckpt"
        return torch.load(last, weights_only=True)["global_step"] if last.exists() else None

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:
            self.found = saved()

    look = Look()
    train(tmp_path, look, every=every)
    assert (look.found, saved()) == (during, end)


@quiet_lightning
def test_no_checkpoint_at_the_end_of_a_run_that_ended_before_its_last_step(tmp_path: Path) -> None:
    """Resumed it would train on, where the run that was not killed has ended."""

    class Early(Callback):  # after the checkpoint callback, as EarlyStopping
        def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
            trainer.should_stop = trainer.global_step == 6

    trainer = Trainer(
        max_steps=10, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, plugins=[AtomicCheckpointIO()], callbacks=[StepCheckpoint(tmp_path, 4), Early()],
    )  # fmt: skip
    trainer.fit(Dropped(), Resumable())
    assert trainer.global_step == 6
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


@quiet_lightning
def test_metrics_and_rates_come_back_with_a_checkpoint(tmp_path: Path) -> None:
    class Logged(Dropped):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.log("train/step", float(self.global_step))
            return super().training_step(batch, batch_idx)

    def trained() -> tuple[StepCheckpoint, Throughput]:
        callbacks = StepCheckpoint(tmp_path, 4), Throughput()
        last = tmp_path / "last.ckpt"
        trainer = Trainer(
            max_steps=10, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, plugins=[AtomicCheckpointIO()], callbacks=list(callbacks),
        )  # fmt: skip
        trainer.fit(Logged(), Resumable(), ckpt_path=str(last) if last.exists() else None)
        return callbacks

    checkpoint, rates = trained()
    again, rates_again = trained()  # makes no step
    assert checkpoint.metrics["train/step"] == 9.0
    assert again.metrics == checkpoint.metrics
    assert rates_again.summary == rates.summary
    assert rates.summary["perf/step_s"] > 0


class TwoUpdates(Dropped):
    """Makes two updates a batch, as PPO does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.net(batch[0]).sum())
            optimizer.step()


@quiet_lightning
def test_several_updates_a_batch_do_not_miss_the_period(tmp_path: Path) -> None:
    trainer = Trainer(
        max_steps=10, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, plugins=[AtomicCheckpointIO()], callbacks=[StepCheckpoint(tmp_path, 3)],
    )  # fmt: skip
    trainer.fit(TwoUpdates(), Resumable())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 10


def test_round_trip_leaves_only_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": torch.arange(3), "step": 2, "name": "a"}, path)
    found = AtomicCheckpointIO().load_checkpoint(path)
    assert (found["step"], found["name"], found["x"].tolist()) == (2, "a", [0, 1, 2])
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


class Full(io.FileIO):
    """A file on a file system with room for a few bytes."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 500:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "last.ckpt", Path.open
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", *a, **k: Full(self, "w") if mode == "wb" else real(self, mode, *a, **k)
    )
    with pytest.raises(UserError, match=r"cannot write .*last\.ckpt: No space left on device"):
        AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(10_000)}, path)
    monkeypatch.undo()
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("flag", [None, True, False])
def test_a_checkpoint_with_code_is_refused_and_does_not_run(flag: bool | None, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"state_dict": Payload(marker)}, tmp_path / "new.ckpt")
    torch.save({"state_dict": Payload(marker)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Payload(marker)))
    for name in ("new", "old", "raw"):
        with pytest.raises(UserError, match=f"{name}.ckpt is damaged or contains more than tensors"):
            AtomicCheckpointIO().load_checkpoint(tmp_path / f"{name}.ckpt", weights_only=flag)
    assert not marker.exists()


@pytest.mark.parametrize("state", [{}, {"ranks": "1", "states": []}, {"ranks": "1", "states": [{"python": [1]}]}])
def test_a_damaged_random_state_is_told(state: dict[str, Any]) -> None:
    callback = RandomState()
    callback.load_state_dict(state)
    trainer: Any = SimpleNamespace(is_global_zero=False, strategy=None, global_rank=0)
    with pytest.raises(UserError, match="random states are not those of a run"):
        callback.on_train_batch_start(trainer, LightningModule(), None, 0)


def test_damaged_or_missing_checkpoints_are_named(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1000)}, tmp_path / "good.ckpt")
    whole = (tmp_path / "good.ckpt").read_bytes()
    for name, content in {"empty": b"", "cut": whole[:2000], "text": b"not a checkpoint\n" * 20}.items():
        (tmp_path / f"{name}.ckpt").write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.ckpt (cannot be read|is damaged)"):
            AtomicCheckpointIO().load_checkpoint(tmp_path / f"{name}.ckpt")
    with pytest.raises(UserError, match=r"none.ckpt cannot be read: .*No such file"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")
