"""A run that does other than asked says so in one line; a run that does what was asked says nothing."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping

from rlhf_lightning.callbacks.notices import Notices
from tests.callbacks.test_progress import Endless, Plain
from tests.helpers.lightning import quiet_lightning
from tests.modules import bandit


def train(module: Any, *callbacks: Any, data: Any = None, **options: Any) -> None:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[*callbacks, Notices()], **options,
    )  # fmt: skip
    trainer.fit(module, data)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Any:
    """Return what was printed since, which is what the log file got."""
    caplog.set_level(logging.WARNING, "rlhf_lightning.models")  # attention is chosen
    caplog.set_level(logging.INFO, "rlhf_lightning")

    def read() -> list[str]:
        printed = capsys.readouterr().out.splitlines()
        assert [record.getMessage() for record in caplog.records if "rlhf" in record.name] == printed
        caplog.clear()
        return printed

    return read


@quiet_lightning
@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": -1, "max_steps": 6},
        {"max_epochs": 2, "max_steps": 6},
        {"max_epochs": 1, "max_steps": 4},
        {"max_epochs": 2},
        {"max_steps": 1},
    ],
)
def test_a_run_as_asked_says_nothing(options: dict[str, Any], said: Any) -> None:
    train(Plain(), EarlyStopping("train/loss", patience=9), **options)
    assert said() == []


@quiet_lightning
def test_epochs_that_end_before_max_steps(said: Any) -> None:
    train(Plain(), max_epochs=2, max_steps=100)
    assert said() == [
        "max_epochs=2 ends the run after 8 of max_steps=100 updates; add max_epochs=-1 to repeat the data",
        "max_epochs=2 ended the run after 8 of max_steps=100 updates; add max_epochs=-1 to repeat the data",
    ]


@quiet_lightning
def test_epochs_of_unknown_length_are_noticed_at_the_end(said: Any) -> None:
    class Short(Endless):
        def __iter__(self) -> Any:
            return (row for row, _ in zip(super().__iter__(), range(3), strict=False))

    train(Plain(Short()), max_epochs=1, max_steps=5)
    assert said() == ["max_epochs=1 ended the run after 3 of max_steps=5 updates; add max_epochs=-1 to repeat the data"]


@pytest.mark.slow
@quiet_lightning
def test_updates_of_ppo_are_counted_as_planned(said: Any) -> None:
    data = bandit.Prompts(2)
    train(bandit.build(ppo_epochs=3), data=data, max_epochs=1, max_steps=6, limit_val_batches=0)
    assert said() == []
    train(bandit.build(ppo_epochs=3), data=data, max_epochs=1, max_steps=7, limit_val_batches=0)
    assert [line.split(";")[0] for line in said()] == [
        f"max_epochs=1 {verb} the run after 6 of max_steps=7 updates" for verb in ("ends", "ended")
    ]


@quiet_lightning
@pytest.mark.parametrize(("steps", "done"), [(100, "8 of max_steps=100 updates"), (-1, "8 updates")])
def test_the_reason_of_early_stopping(steps: int, done: str, said: Any) -> None:
    stopping = EarlyStopping("val/loss", patience=1)  # the loss is the same after both epochs
    train(Plain(), stopping, max_epochs=-1 if steps > 0 else 50, max_steps=steps)
    assert said() == [
        f"EarlyStopping ended the run after {done}: Monitored metric val/loss did not improve in the last 1 records. "
        "Best score: 0.250."
    ]


@quiet_lightning
def test_a_run_that_was_asked_to_stop_says_nothing(said: Any) -> None:
    class Asked(Plain):
        def on_train_batch_end(self, *_: Any) -> None:
            self.trainer.should_stop = True

    train(Asked(), EarlyStopping("train/loss"), max_epochs=-1, max_steps=9)
    assert said() == []


@quiet_lightning
@pytest.mark.parametrize(
    "options", [{}, {"estimator": "rloo", "num_generations": 2}, {"estimator": "grpo", "num_generations": 2}]
)
def test_rewards_that_are_all_equal(options: dict[str, Any], said: Any) -> None:
    module = bandit.build(reward=lambda prompts, responses, metadata: [0.1] * len(responses), **options)
    train(module, data=bandit.Prompts(2, size=7), max_epochs=1, limit_val_batches=0)
    assert said() == ["every reward of the run was 0.1, so nothing could be learned from it: look at reward_from"]


@pytest.mark.slow
@quiet_lightning
def test_rewards_that_differ_say_nothing(said: Any) -> None:
    train(bandit.build(), data=bandit.Prompts(2), max_epochs=1, limit_val_batches=0)
    assert said() == []
    values = iter([0.0, 1.0])  # equal within an iteration, but not over the run
    module = bandit.build(reward=lambda prompts, responses, metadata: [next(values)] * len(responses))
    train(module, data=bandit.Prompts(2), max_epochs=1, limit_val_batches=0)
    assert said() == []


def test_a_resumed_run_remembers_its_rewards(said: Any) -> None:
    stub: Any = SimpleNamespace(
        callback_metrics={"reward/proxy": 0.5, "reward/proxy_std": 0.2}, is_global_zero=True, global_step=2,
        max_steps=2, should_stop=False,
    )  # fmt: skip
    first, second = Notices(), Notices()
    first.on_train_batch_end(stub, stub, None, None, 0)
    second.load_state_dict(first.state_dict())
    stub.callback_metrics = {"reward/proxy": 1.0, "reward/proxy_std": 0.0}
    second.on_train_batch_end(stub, stub, None, None, 1)
    second.on_train_end(stub, stub)
    assert said() == []


def test_other_ranks_say_nothing(said: Any) -> None:
    stub: Any = SimpleNamespace(
        callback_metrics={"reward/proxy": 0.5, "reward/proxy_std": 0.0}, is_global_zero=False, global_step=2,
        max_steps=9, max_epochs=1, current_epoch=1, should_stop=False, estimated_stepping_batches=2,
    )  # fmt: skip
    notices = Notices()
    notices.on_train_start(stub, stub)
    notices.on_train_batch_end(stub, stub, None, None, 0)
    notices.on_train_end(stub, stub)
    assert said() == []
