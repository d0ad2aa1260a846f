"""A signal ends a run with its number, whatever loop it is in."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from rlhf_lightning.callbacks.stop import Stop, interrupted_at_once, interruptible
from tests.callbacks.test_checkpoints import Dropped, Resumable
from tests.helpers.lightning import quiet_lightning


class Sends(Callback):
    """Sends this process a signal in one hook."""

    def __init__(self, hook: str, number: int) -> None:
        setattr(self, hook, lambda *args, **kwargs: os.kill(os.getpid(), number))


class Validated(Dropped):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> int:
        return 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("loop", "hook"),
    [
        ("fit", "on_sanity_check_start"),
        ("fit", "on_train_start"),
        ("fit", "on_train_batch_start"),
        ("fit", "on_validation_batch_start"),
        ("validate", "on_validation_start"),
        ("validate", "on_validation_batch_start"),
        ("predict", "on_predict_start"),
        ("predict", "on_predict_batch_end"),
    ],
)
@quiet_lightning
def test_a_signal_in_any_loop_ends_with_its_number(loop: str, hook: str, number: int) -> None:
    """Lightning alone ends with 0 on SIGTERM, as if the run were done, and with 1 on Ctrl-C."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    rows = DataLoader(TensorDataset(torch.zeros(6, 4)), batch_size=1)
    trainer = Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=2, val_check_interval=2,
        callbacks=[Stop(), Sends(hook, number)],
    )  # fmt: skip
    loops: dict[str, Any] = {
        "fit": lambda: trainer.fit(Validated(), Resumable(), rows),
        "validate": lambda: trainer.validate(Validated(), rows, verbose=False),
        "predict": lambda: trainer.predict(Validated(), rows),
    }
    try:
        with pytest.raises(KeyboardInterrupt) as caught, interruptible(trainer):
            loops[loop]()
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)
    assert caught.value.args == (128 + number,)


@quiet_lightning
def test_another_exit_is_not_taken_for_a_signal() -> None:
    class Leave(Callback):
        def on_train_batch_start(self, *rest: Any) -> None:
            raise SystemExit(3)

    trainer = Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Stop(), Leave()],
    )  # fmt: skip
    with pytest.raises(SystemExit) as caught, interruptible(trainer):
        trainer.fit(Dropped(), Resumable())
    assert caught.value.code == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_export_ends_it_where_it_is(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as caught, interrupted_at_once():
        os.kill(os.getpid(), number)
        pytest.fail("the signal did nothing")
    assert caught.value.args == (128 + number,)
    assert signal.getsignal(number) is before
