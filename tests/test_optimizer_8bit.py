"""AdamW with states of 8 bits: it learns what AdamW learns, and a resumed run is bit-equal."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from rlhf_lightning import SFT, DemonstrationData
from rlhf_lightning.callbacks.checkpoints import AtomicCheckpointIO, StepCheckpoint
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from tests.helpers.lightning import quiet_lightning
from tests.modules.offline import demonstrations, start

bnb = pytest.importorskip(
    "bitsandbytes", reason="the package bitsandbytes is absent: pip install 'rlhf-lightning[8bit]'"
)
RATE = 5e-3


def run(
    folder: str, place: Path, optimizer: Any, steps: int, resume: bool = False
) -> tuple[dict[str, Tensor], Trainer]:
    rows = demonstrations(8)
    data = DemonstrationData(load_tokenizer(folder), rows, rows, batch_size=8, cache_dir=place / "cache")
    module = SFT(partial(load_causal_lm, folder), partial(optimizer, lr=RATE))
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        callbacks=[StepCheckpoint(place, every_n_steps=1)], plugins=[AtomicCheckpointIO()], enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=str(place / "last.ckpt") if resume else None)
    return module.state_dict(), trainer


@pytest.mark.slow
@quiet_lightning
def test_it_learns_what_adamw_learns_and_resumes(tmp_path: Path) -> None:
    folder = start(tmp_path)
    _, exact = run(folder, tmp_path / "exact", torch.optim.AdamW, 6)
    weights, trainer = run(folder, tmp_path / "whole", bnb.optim.AdamW8bit, 6)
    found, expected = (t.callback_metrics["train/loss"].item() for t in (trainer, exact))
    assert found == pytest.approx(expected, rel=0.02)
    states = [s for s in trainer.optimizers[0].state.values() if s["state1"].dtype == torch.uint8]
    assert states  # weights of fewer than 4096 numbers keep 32 bits
    run(folder, tmp_path / "parts", bnb.optim.AdamW8bit, 3)
    resumed, _ = run(folder, tmp_path / "parts", bnb.optim.AdamW8bit, 6, resume=True)
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())
    assert torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)["global_step"] == 6
