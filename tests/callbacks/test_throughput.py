"""Rates count real rows and tokens over training time, without the batch that warms up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_lightning.callbacks import throughput
from rlhf_lightning.callbacks.throughput import Throughput, peak_memory_gb
from rlhf_lightning.ops.groups import Group, pack


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)


class Stub:
    """Trainer and module in one."""

    def __init__(self, world_size: int = 1) -> None:
        self.global_step = 0
        self.strategy = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": world_size, "rank": 0})
        self.logged: list[dict[str, float]] = []

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
