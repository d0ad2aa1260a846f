"""`trainer.accumulate_grad_batches=auto`: how many microbatches, where it is one, and that a resume keeps the number."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from rlhf_lightning.data.datamodules import DemonstrationData
from rlhf_lightning.errors import UserError
from rlhf_lightning.runtime.memory import Job, Shape, estimate
from rlhf_lightning.stages import STAGES, microbatches, sizes
from rlhf_lightning.stages.microbatches import choose, split_steps, tokens_that_fit
from rlhf_lightning.stages.training import check_arguments
from tests.test_plan import settings

LARGE = Shape(10**9, 0, hidden=2048, intermediate=8192, layers=20, key_values=1024, vocabulary=32_768)


def made(*overrides: str, stage: str = "sft", device: str = "cpu") -> Any:
    given = settings(f"stage={stage}", *overrides)
    return SimpleNamespace(stage=STAGES[stage], settings=given, device=device)


def of_lengths(*tokens: int, batch_size: int = 8) -> Any:
    data = object.__new__(DemonstrationData)
    data.__dict__ |= {"rows": {"train": SimpleNamespace(tokens=np.array(tokens))}, "windows": None}
    data.__dict__ |= {"batch_size": batch_size, "max_length": 512}
    return data


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("layer_sizes", "read_shape"):
        monkeypatch.setattr(microbatches, name, lambda _: LARGE)
    monkeypatch.setattr(microbatches, "read_config", lambda _: None)


def test_a_cpu_reads_about_a_thousand_tokens_at_a_time() -> None:
    assert choose(made(), of_lengths(*[300] * 16)) == math.ceil(8 * 300 / 1024) == 3
    assert choose(made(), of_lengths(*[100] * 16)) == 1
    assert choose(made(), of_lengths(*[4000] * 16)) == 8  # a row is not split
    assert choose(made("trainer.devices=2"), of_lengths(*[300] * 16)) == 2
    assert choose(made(), of_lengths(*[4000] * 3)) == 3  # fewer rows than a step asks for


def test_a_cpu_does_not_split_steps_of_a_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Shape(10**5, 0, hidden=64, intermediate=160, layers=2, key_values=64, vocabulary=512)
    monkeypatch.setattr(microbatches, "layer_sizes", lambda _: small)
    assert choose(made(), of_lengths(*[2000] * 16)) == 1


@pytest.mark.parametrize("gigabytes", [30.0, 40.0, 80.0])
def test_an_accelerator_reads_as_many_of_the_longest_rows_as_fit(
    monkeypatch: pytest.MonkeyPatch, gigabytes: float
) -> None:
    run = made("trainer=gpu", "data.batch_size=16", device="cuda")
    monkeypatch.setattr(microbatches, "device_gb", lambda: gigabytes)
    lengths = [2048, 1024, *[100] * 30]
    parts = choose(run, of_lengths(*lengths, batch_size=16))

    def needed(parts: int) -> float:
        longest = sum(sorted(lengths, reverse=True)[: math.ceil(16 / parts)])
        job = sizes.read_job(run.settings)
        return sum(estimate(LARGE, job_of(job, longest)).values()) / 1e9

    def job_of(job: Job, tokens: int) -> Job:
        return Job(**{**vars(job), "tokens": tokens})

    assert needed(parts) <= sizes.room(gigabytes) or parts == 16
    assert parts == 1 or needed(parts - 1) > sizes.room(gigabytes)


def test_free_memory_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the device of this rank, 30 of 80 GB free."""
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (30e9, 80e9))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert sizes.device_gb() == 30
    assert asked == [1]


def test_ranks_take_the_number_of_the_first() -> None:
    """Whose device has less free memory than this one's."""
    run = made("trainer=gpu", "trainer.devices=2", "data.batch_size=16", device="cuda")
    data = of_lengths(2048, 1024, *[100] * 30, batch_size=16)

    def chosen(rank: int, gigabytes: float) -> int:
        patch.setattr(rank_zero_only, "rank", rank)
        patch.setattr(microbatches, "device_gb", lambda: gigabytes)
        return choose(run, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_MICROBATCHES", "")  # undone after the test
        first = chosen(0, 25.0)
        assert first == chosen(1, 80.0) > 1
        assert chosen(0, 80.0) == 1


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("gigabytes", [24, 80])
def test_tokens_that_fit_fill_the_room(gigabytes: int, checkpointing: str) -> None:
    """With little room and gradient checkpointing the logits decide, with much the layer that is computed again."""
    given = settings("stage=sft", "trainer=gpu", f"model.load.gradient_checkpointing={checkpointing}")
    job = Job(**{**vars(sizes.read_job(given)), "tokens": tokens_that_fit(given, gigabytes)})
    assert job.tokens > 0
    assert sum(estimate(LARGE, job).values()) == pytest.approx(sizes.room(gigabytes) * 1e9)


@pytest.mark.parametrize(
    ("overrides", "stage", "data", "expected"),
    [
        ([], "sft", of_lengths(*[300] * 16), 3),
        (["trainer.accumulate_grad_batches=2"], "sft", of_lengths(*[300] * 16), 2),
        (["trainer.limit_train_batches=4"], "sft", of_lengths(*[300] * 16), 1),
        (["trainer.overfit_batches=2"], "sft", of_lengths(*[300] * 16), 1),
        (["trainer.fast_dev_run=true"], "sft", of_lengths(*[300] * 16), 1),
        (["trainer.devices=auto"], "sft", of_lengths(*[300] * 16), 1),
        ([], "ppo", of_lengths(*[300] * 16), 1),
        ([], "sft", object(), 1),
    ],
)
def test_the_number_replaces_auto(overrides: list[str], stage: str, data: Any, expected: int) -> None:
    run = made(*overrides, stage=stage)
    split_steps(run, data)
    assert run.settings["trainer"]["accumulate_grad_batches"] == expected


@pytest.mark.parametrize("given", ["atuo", "0", "1.5", "true"])
def test_another_value_is_refused(given: str) -> None:
    arguments = settings("stage=sft", f"trainer.accumulate_grad_batches={given}")["trainer"]
    with pytest.raises(UserError, match="is neither auto nor a whole number of at least 1"):
        check_arguments(arguments)


def test_a_resumed_run_keeps_its_number() -> None:
    run = made()
    split_steps(run, of_lengths(*[300] * 16), kept=5)
    assert run.settings["trainer"]["accumulate_grad_batches"] == 5


def test_windows_are_counted_with_the_longest_rows() -> None:
    data = of_lengths(3)
    data.windows = object()
    assert choose(made(), data) == math.ceil(8 * 512 / 1024)
