"""What stands on the terminal during a run, and the lines a log gets instead."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from rlhf_lightning.callbacks import progress
from rlhf_lightning.callbacks.progress import (
    LineProgress,
    RunProgressBar,
    duration,
    log_above,
    planned_updates,
    progress_bar,
)
from tests.helpers.lightning import quiet_lightning
from tests.modules.bandit import Prompts, build


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that the test moves."""
    moved = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: moved.now)
    return moved


class Stub:
    """Trainer and module in one."""

    is_global_zero, sanity_checking = True, False
    max_steps, max_epochs, estimated_stepping_batches = 10, -1, 10
    num_val_batches = num_predict_batches = (4,)

    def __init__(self, **attributes: Any) -> None:
        self.global_step, self.callback_metrics = 0, {}
        self.lightning_module = self
        self.__dict__ |= attributes


def drawn(bar: RunProgressBar, width: int = 80) -> list[str]:
    """Return the lines that the bar would draw on a terminal of `width` columns."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(bar.render())
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def attached(stub: Any) -> RunProgressBar:
    """Return a bar that draws nothing by itself and has seen the start of the stub's run."""
    bar = RunProgressBar()
    bar.setup(stub, stub, "fit")
    bar.start = bar.stop = lambda: None
    bar.on_train_start(stub, stub)
    return bar


# ---- the bar -----------------------------------------------------------------------------------------------------------


def test_bar_has_updates_time_left_and_metrics_of_the_whole_run(clock: Any) -> None:
    stub = Stub(global_step=2)  # resumed here: what was done before says nothing about speed
    bar = attached(stub)
    assert drawn(bar)[0].endswith("2/10 steps  0:00 so far")
    stub.global_step, clock.now = 6, clock.now + 8
    stub.callback_metrics = {"kl/reference": 0.5, "reward/proxy": torch.tensor(-0.98768), "optim/lr": 1.0}
    bar.on_train_batch_end(stub, stub, None, None, 0)
    top, below = drawn(bar)
    assert top.endswith("6/10 steps  0:08 so far, 0:08 left")
    assert below == "reward/proxy -0.9877  kl/reference 0.5"
    clock.now += 5  # the next batch is under way
    assert drawn(bar)[0].endswith("0:13 so far, 0:03 left")
    clock.now += 5
    assert drawn(bar)[0].endswith("0:18 so far, 0:00 left")


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_bar_never_breaks_a_line(width: int, clock: Any) -> None:
    stub = Stub(max_steps=100_000, estimated_stepping_batches=100_000)
    bar = attached(stub)
    bar.begin("Validation", [100])
    stub.global_step, clock.now = 99_000, clock.now + 36_000
    stub.callback_metrics = dict.fromkeys(progress.SHOWN, -0.01234)
    bar.on_train_batch_end(stub, stub, None, None, 0)
    top, below, metrics = drawn(bar, width)
    assert "99000/100000 steps  10:00:00 so far, 6:03 left" in top
    assert "0/100 batches" in below
    assert max(map(len, (top, below, metrics))) <= width
    assert metrics.endswith("…") == (width < 140)


def test_updates_inside_a_batch_show_before_it_ends(clock: Any) -> None:
    stub = Stub()
    bar = attached(stub)
    stub.global_step = 3  # of PPO's several a batch
    assert "3/10 steps" in drawn(bar)[0]
    stub.global_step = 12  # the iteration that reaches the last update is finished
    assert "12/12 steps" in drawn(bar)[0]


@pytest.mark.parametrize(("step", "times"), [(10, "0:08 so far, 0:00 left"), (6, "0:08 so far")])
def test_nothing_is_left_of_a_run_that_has_ended(step: int, times: str, clock: Any) -> None:
    stub = Stub()
    bar = attached(stub)
    pace: Any = bar.training
    stub.global_step, clock.now = step, clock.now + 8
    bar.on_train_end(stub, stub)
    clock.now += 60  # of the last samples and validation
    bar.training = pace
    assert drawn(bar)[0].endswith(f"{step}/10 steps  {times}")


def test_metrics_are_not_read_at_every_batch(clock: Any) -> None:
    stub = Stub(callback_metrics={"train/loss": 1.0})
    bar = attached(stub)
    for step, seconds, shown in [(1, 0.1, "1"), (2, 0.1, "1"), (3, 0.2, "3")]:
        stub.global_step, clock.now = step, clock.now + seconds
        stub.callback_metrics = {"train/loss": float(step)}
        bar.on_train_batch_end(stub, stub, None, None, step)
        assert drawn(bar)[1] == f"train/loss {shown}"
    stub.callback_metrics = {"train/loss": 4.0}
    bar.on_train_end(stub, stub)
    assert bar.metrics == "train/loss 4"


def test_a_validation_has_a_bar_while_it_lasts(clock: Any) -> None:
    stub = Stub()
    bar = attached(stub)
    bar.on_validation_start(stub, stub)
    clock.now += 2
    bar.on_validation_batch_end(stub, stub, None, None, 0)
    assert drawn(bar)[1].startswith("Validation  ━")
    assert drawn(bar)[1].endswith("1/4 batches  0:02 so far, 0:06 left")
    stub.callback_metrics = {"val/loss": 2.0}
    bar.on_validation_end(stub, stub)
    assert drawn(bar)[1:] == ["val/loss 2"]


def test_data_without_a_length_has_no_total(clock: Any) -> None:
    stub = Stub(max_steps=-1)
    bar = attached(stub)
    stub.global_step, clock.now = 4, clock.now + 8
    bar.on_train_batch_end(stub, stub, None, None, 0)
    assert drawn(bar)[0].endswith(" 4 steps  0:08 so far")


def test_other_ranks_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "Live", None)  # calling it would fail
    stub, bar = Stub(is_global_zero=False), RunProgressBar()
    bar.setup(stub, stub, "fit")
    bar.on_train_start(stub, stub)
    bar.on_train_batch_end(stub, stub, None, None, 0)
    bar.on_validation_start(stub, stub)
    bar.on_validation_end(stub, stub)
    bar.on_train_end(stub, stub)


# ---- in a Trainer ------------------------------------------------------------------------------------------------------


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        while True:
            yield torch.zeros(1)


class Plain(LightningModule):
    """Any Lightning module: it knows nothing of this package."""

    def __init__(self, data: Any = None) -> None:
        super().__init__()
        self.weight, self.rows = nn.Parameter(torch.ones(1)), torch.zeros(4, 1) if data is None else data

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("train/loss", 0.5)
        return self.weight.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", 0.25)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(self.rows)

    def val_dataloader(self) -> Any:
        return DataLoader(torch.zeros(3, 1))


class Frames(Callback):
    """Keeps what stands on the terminal after every batch."""

    def __init__(self, bar: RunProgressBar) -> None:
        self.bar, self.frames = bar, []

    def on_train_batch_end(self, *_: Any) -> None:
        self.frames.append(drawn(self.bar))

    def on_validation_batch_end(self, *_: Any) -> None:
        self.frames.append(drawn(self.bar))


def trained(
    module: LightningModule, monkeypatch: pytest.MonkeyPatch, bar: RunProgressBar, data: Any = None, **options: Any
) -> Frames:
    """Train with the bar on a terminal, which is a buffer, and return its frames."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    frames = Frames(bar)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[bar, frames], enable_model_summary=False,
        num_sanity_val_steps=options.pop("sanity", 0), log_every_n_steps=1, **options,
    )  # fmt: skip
    trainer.fit(module, data)
    assert bar.live is None
    return frames


def counts(frames: Frames, name: str = "Training") -> list[str]:
    """Return what every frame's bar counts, such as "2/4"."""
    lines = [line for frame in frames.frames for line in frame if line.startswith(name)]
    return [line[: line.rindex(" steps" if " steps" in line else " batches")].split()[-1] for line in lines]


@quiet_lightning
@pytest.mark.parametrize(
    ("data", "options", "last"),
    [
        (None, {"max_epochs": -1, "max_steps": 6}, "6/6"),  # more than an epoch
        (None, {"max_epochs": 1, "max_steps": 6}, "4/4"),
        (None, {"max_epochs": 2, "accumulate_grad_batches": 2}, "4/4"),
        (Endless(), {"max_epochs": -1, "max_steps": 3}, "3/3"),
        (Endless(), {"max_epochs": 1, "limit_train_batches": 2}, "2/2"),
    ],
)
def test_total_is_that_of_the_run(
    data: Any, options: dict[str, Any], last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = trained(Plain(data), monkeypatch, RunProgressBar(), sanity=2, **options)
    assert counts(frames)[-1] == last
    assert {count.split("/")[1] for count in counts(frames)} == {last.split("/")[1]}
    assert "3/3" in counts(frames, "Validation") or options.get("max_epochs") == -1
    assert not any("v_num" in line for frame in frames.frames for line in frame)


@quiet_lightning
def test_ppo_counts_its_updates_and_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    module, bar, phases = build(ppo_epochs=2, num_minibatches=2), RunProgressBar(), []

    def noting(method: Any) -> Any:
        def noted(*args: Any) -> Any:
            result = method(*args)
            phases.append(drawn(bar)[1].rsplit("  ", 1)[-1])
            return result

        return noted

    for name in ("rollout", "logprobs", "update"):
        setattr(module, name, noting(getattr(module, name)))
    frames = trained(module, monkeypatch, bar, Prompts(2), max_epochs=-1, max_steps=8, limit_val_batches=0)
    assert counts(frames)[:2] == ["4/8", "8/8"]
    assert phases == ["generating responses", "computing log-probabilities", "updating the policy"] * 2
    assert "reward/proxy" in frames.frames[-1][-1]
    assert "kl/reference" in frames.frames[-1][-1]


@quiet_lightning
def test_the_terminal_is_given_back_when_a_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(Plain):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise ValueError("here")

    terminal = io.StringIO()
    bar = RunProgressBar()
    monkeypatch.setattr(sys, "stdout", terminal)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[bar], enable_model_summary=False,
        max_epochs=1, num_sanity_val_steps=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="here"):
        trainer.fit(Breaks())
    assert bar.live is None
    assert sys.stdout is terminal


def test_log_lines_go_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, above = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "__stdout__", terminal)
    handler = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(handler)
    try:
        monkeypatch.setattr(sys, "stdout", above)
        with log_above():
            logging.getLogger("rlhf_lightning").warning("while it is drawn")
        logging.getLogger("rlhf_lightning").warning("after it")
    finally:
        logging.getLogger().removeHandler(handler)
    assert above.getvalue() == "while it is drawn\n"
    assert terminal.getvalue() == "after it\n"


def test_a_run_without_limits_has_no_plan() -> None:
    assert planned_updates(Stub(max_steps=-1), Stub()) is None
    assert planned_updates(Stub(estimated_stepping_batches=float("inf")), Stub()) is None
    assert planned_updates(Stub(estimated_stepping_batches=-1, max_steps=-1, max_epochs=1), Stub()) is None
    assert planned_updates(Stub(), Stub()) == 10


# ---- lines -------------------------------------------------------------------------------------------------------------


def test_line_has_percent_time_left_and_metrics(clock: Any) -> None:
    stub, lines = Stub(global_step=2), LineProgress()
    lines.on_train_start(stub, stub)
    stub.global_step, clock.now = 6, clock.now + 8
    stub.callback_metrics = {"train/loss": 1.23456, "optim/lr": 1.0}
    assert lines.line(stub) == "  step 6/10 (60%)  0:08 so far, 0:08 left  train/loss 1.235"


def test_lines_come_every_few_seconds_and_at_the_end(clock: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stub, lines = Stub(), LineProgress(seconds=15)
    lines.on_train_start(stub, stub)
    for step in range(10):
        stub.global_step, clock.now = step + 1, clock.now + 4
        lines.on_train_batch_end(stub, stub, None, None, step)
    lines.on_train_end(stub, stub)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == ["4/10", "8/10", "10/10"]
    assert "\x1b" not in "".join(printed)


def test_lines_of_other_ranks_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    stub, lines = Stub(is_global_zero=False), LineProgress(seconds=0)
    lines.on_train_start(stub, stub)
    lines.on_train_batch_end(stub, stub, None, None, 0)
    lines.on_train_end(stub, stub)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_the_bar_and_a_pipe_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    assert isinstance(progress_bar(), RunProgressBar)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    bar = progress_bar()
    assert isinstance(bar, LineProgress)
    Trainer(callbacks=[bar], logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3661, "1:01:01")])
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
