"""A thread packs the next batch: the same batches, the same training, the same resume."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from rlhf_lightning import SFT, DemonstrationData
from rlhf_lightning.data.prefetch import prefetched
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from tests.helpers.lightning import quiet_lightning
from tests.modules.offline import adam, demonstrations, start


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_batches_come_in_order_one_ahead() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in range(5):
            taken.append(number)
            yield number

    ready = threading.Event()
    seen: list[int] = []
    for number, batch in enumerate(prefetched(source(), lambda n: ready.set() or n + 100)):
        seen.append(batch)
        assert ready.wait(10)
        ready.clear()
        assert len(taken) <= number + 2
    assert seen == [100, 101, 102, 103, 104]
    assert not threads()


def test_an_error_comes_in_place_of_its_batch() -> None:
    def prepare(number: int) -> int:
        if number == 2:
            raise UserError("row 2 is bad")
        return number

    batches, seen = prefetched(iter(range(5)), prepare), []
    with pytest.raises(UserError, match="row 2 is bad"):
        for batch in batches:
            seen.append(batch)
    assert seen == [0, 1]
    assert not threads()


def test_a_closed_iterator_leaves_no_thread() -> None:
    batches = prefetched(iter(range(5)), lambda n: n)
    assert next(batches) == 0
    assert threads()
    batches.close()  # type: ignore[attr-defined]
    assert not threads()


class Save(Callback):
    """Writes a checkpoint after some updates."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and (trainer.fit_loop.epoch_loop.batch_idx + 1) % 2 == 0:
            trainer.save_checkpoint(self.path)


def train(folder: str, cache: Path, prefetch: bool, steps: int, resume: Path | None = None, save: Any = ()) -> Any:
    data = DemonstrationData(load_tokenizer(folder), demonstrations(16), batch_size=6, cache_dir=cache)
    data.prefetch = prefetch
    module = SFT(partial(load_causal_lm, folder), adam())
    packers: set[str] = set()
    pack_ahead = module.pack_ahead

    def noted(batch: Any) -> Any:
        packers.add(threading.current_thread().name.split("_")[0])
        return pack_ahead(batch)

    module.pack_ahead = noted  # type: ignore[method-assign]
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2, use_distributed_sampler=False,
        callbacks=list(save),
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    assert packers == ({"prefetch"} if prefetch else set())
    return {name: weight.clone() for name, weight in module.state_dict().items()}


@pytest.mark.slow
@quiet_lightning
def test_training_and_resume_are_bit_equal(tmp_path: Path) -> None:
    """Steps of two microbatches, three an epoch: it stops within the second epoch, with a batch packed ahead."""
    folder = start(tmp_path)
    expected = train(folder, tmp_path, prefetch=False, steps=7)
    saved = tmp_path / "saved.ckpt"
    found = train(folder, tmp_path, prefetch=True, steps=7, save=[Save(saved, 4)])
    resumed = train(folder, tmp_path, prefetch=True, steps=7, resume=saved)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight)
        assert torch.equal(resumed[name], weight)
    assert not threads()


def test_only_an_accelerator_and_stages_that_pack_their_batches_prefetch() -> None:
    from types import SimpleNamespace

    data = object.__new__(DemonstrationData)

    def chosen(device: str, automatic: bool = True) -> bool:
        module = SimpleNamespace(pack_ahead=print, automatic_optimization=automatic)
        strategy = SimpleNamespace(root_device=torch.device(device))
        data.__dict__["trainer"] = SimpleNamespace(lightning_module=module, strategy=strategy)
        return data._pack_ahead() is not None

    assert chosen("cuda")
    assert not chosen("cpu")
    assert not chosen("cuda", automatic=False)
