"""Rates count real rows and tokens over training time, without the batch that warms up."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer

from rlhf_lightning.callbacks import throughput
from rlhf_lightning.callbacks.progress import LineProgress, duration, progress_bar
from rlhf_lightning.callbacks.throughput import Throughput, peak_memory_gb
from rlhf_lightning.ops.groups import Group, pack


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(throughput.time, "monotonic", lambda: self.now)


class Stub:
    """Trainer and module in one."""

    is_global_zero = True
    max_steps = 10

    def __init__(self, world_size: int = 1) -> None:
        self.global_step = 0
        self.strategy = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": world_size, "rank": 0})
        self.logged: list[dict[str, float]] = []
        self.callback_metrics: dict[str, float] = {}

    def log_dict(self, values: dict[str, float]) -> None:
        self.logged.append(dict(values))


def run(clock: Clock, stub: Any, batches: list[Any], seconds: list[float], updates: int = 1) -> Throughput:
    callback = Throughput()
    for number, (batch, elapsed) in enumerate(zip(batches, seconds, strict=True)):
        callback.on_train_batch_start(stub, stub, batch, number)
        clock.now += elapsed
        stub.global_step += updates
        callback.on_train_batch_end(stub, stub, None, batch, number)
        clock.now += 1000  # validation, checkpoints and samples are not training
    return callback


def test_rates_leave_out_the_first_batch_and_padding(groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pack(groups, row_tokens=40, layout="padded")
    tokens = int((batch.group_ids >= 0).sum())
    assert tokens < batch.group_ids.numel()
    stub = Stub()
    summary = run(Clock(monkeypatch), stub, [batch] * 3, [60.0, 1.0, 3.0]).summary
    assert summary["perf/rows_per_s"] == pytest.approx(2 * 3 / 4)
    assert summary["perf/tokens_per_s"] == pytest.approx(2 * tokens / 4)
    assert summary["perf/step_s"] == pytest.approx(2.0)
    assert summary["perf/peak_memory_gb"] > 0.01
    assert stub.logged[-1] == summary
    assert len(stub.logged) == 2


def test_one_batch_gives_its_own_rates(groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    summary = run(Clock(monkeypatch), Stub(), [pack(groups)], [2.0]).summary
    assert summary["perf/rows_per_s"] == pytest.approx(1.5)
    assert summary["perf/step_s"] == pytest.approx(2.0)


def test_rows_of_all_ranks_count(groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> None:
    summary = run(Clock(monkeypatch), Stub(world_size=2), [pack(groups)] * 2, [1.0, 1.0]).summary
    assert summary["perf/rows_per_s"] == pytest.approx(6.0)
    assert run(Clock(monkeypatch), Stub(world_size=2), [pack(groups)], [1.0]).summary[
        "perf/rows_per_s"
    ] == pytest.approx(6.0)


def test_a_rollout_counts_responses_and_a_step_is_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    stub: Any = Stub()
    stub.rollout_size = (64, 640)
    summary = run(Clock(monkeypatch), stub, [object()] * 3, [9.0, 2.0, 2.0], updates=4).summary
    assert summary["perf/rows_per_s"] == pytest.approx(32.0)
    assert summary["perf/tokens_per_s"] == pytest.approx(320.0)
    assert summary["perf/step_s"] == pytest.approx(0.5)


def test_a_run_without_batches_still_has_the_two_promised_figures() -> None:
    assert {"perf/rows_per_s", "perf/peak_memory_gb"} <= set(Throughput().summary)


def test_peak_memory_is_in_gigabytes() -> None:
    assert 0.05 < peak_memory_gb() < 1000


def test_line_has_percent_time_left_and_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stub = Clock(monkeypatch), Stub()
    progress: Any = LineProgress()
    stub.global_step = 2  # resumed here: what was done before says nothing about speed
    progress.on_train_start(stub, stub)
    stub.global_step, clock.now = 6, clock.now + 8
    stub.callback_metrics = {"train/loss": 1.23456, "optim/lr": 1.0}
    assert progress.line(stub, stub, clock.now) == "  step 6/10 (60%)  0:08 so far, 0:08 left  train/loss 1.235"


def test_lines_come_every_few_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, stub = Clock(monkeypatch), Stub()
    progress: Any = LineProgress(seconds=15)
    progress.on_train_start(stub, stub)
    for step in range(10):
        stub.global_step, clock.now = step + 1, clock.now + 4
        progress.on_train_batch_end(stub, stub, None, None, step)
    progress.on_train_end(stub, stub)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["4/10", "8/10", "10/10"]
    assert "\x1b" not in "".join(lines)


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    stub, progress = Stub(), LineProgress(seconds=0)
    stub.is_global_zero = False
    as_trainer: Any = stub
    progress.on_train_start(as_trainer, as_trainer)
    progress.on_train_batch_end(as_trainer, as_trainer, None, None, 0)
    progress.on_train_end(as_trainer, as_trainer)
    assert capsys.readouterr().out == ""


def test_lines_where_the_output_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    bar = progress_bar()
    assert isinstance(bar, LineProgress)
    Trainer(callbacks=[bar], logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3661, "1:01:01")])
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
