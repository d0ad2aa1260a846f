"""The same rows, weights and optimizer through this package and through a TRL trainer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.models.tiny import build_tiny
from tests.helpers.lightning import quiet_lightning
from tests.modules.offline import WORDS, fit

STEPS, BATCH, RATE, DECAY = 10, 4, 3e-3, 0.1


@dataclass
class Curve:
    """Loss and gradient norm of every optimizer step, each before the update."""

    losses: list[float]
    norms: list[float]


def assert_same(ours: Curve, theirs: Curve) -> None:
    """Compare all steps; the first is one batch through equal weights. Measured: below 3e-6 everywhere."""
    assert len(theirs.losses) == len(theirs.norms) == STEPS
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5, abs=1e-7)  # on-policy losses are 0 up to rounding
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-5)


def quiet_trl(test: Any) -> Any:
    """Mark a test in which TRL's use of a name that transformers renamed is not an error."""
    text = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    return quiet_lightning(pytest.mark.filterwarnings(text)(test))


class Recorder(Callback):
    """Keeps what a Lightning run computes in every optimizer step."""

    def __init__(self) -> None:
        self.curve = Curve([], [])
        self.parts: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.parts.append(outputs["loss"].item())  # divided by the number of parts already
        if trainer.global_step > len(self.curve.losses):
            self.curve.losses.append(sum(self.parts))
            self.curve.norms.append(trainer.callback_metrics["optim/grad_norm"].item())
            self.parts = []


def train_ours(module: Any, data: Any, accumulate: int = 1) -> Curve:
    recorder = Recorder()
    fit(module, data, STEPS, accumulate, callbacks=[recorder], limit_val_batches=0)
    return recorder.curve


def train_theirs(trainer: Any) -> Curve:
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return Curve([entry["loss"] for entry in steps], [entry["grad_norm"] for entry in steps])


def optimizer() -> Any:
    return partial(torch.optim.AdamW, lr=RATE, weight_decay=DECAY)


def arguments(kind: Any, folder: Path, **options: Any) -> Any:
    """Return TRL's arguments for the same ten steps: float32, the given order, no clipping, nothing written."""
    settings: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "use_cpu": True, "bf16": False, "activation_checkpointing": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_steps": STEPS, "logging_steps": 1,
        "per_device_train_batch_size": BATCH, "train_sampling_strategy": "sequential", "optim": "adamw_torch",
        "learning_rate": RATE, "lr_scheduler_type": "constant", "weight_decay": DECAY, "max_grad_norm": 1e9,
    }  # fmt: skip
    return kind(**(settings | options))


def start(folder: Path) -> str:
    """Write a decoder with random weights whose tokenizer knows the words; a second call finds it written."""
    return build_tiny(folder / "start", [" ".join(WORDS)] * 3, vocab_size=330, hidden_size=32, layers=2, heads=2)


def classifier(folder: Path) -> LlamaForSequenceClassification:
    """Return the same random one-output classifier every time."""
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(LlamaConfig.from_pretrained(start(folder), num_labels=1))
    torch.nn.init.normal_(model.score.weight, std=0.5)
    return model


def tokenizer(folder: Path) -> Any:
    return load_tokenizer(start(folder))


def sentence(draw: random.Random, longest: int = 6) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))


def demonstrations(count: int = STEPS * BATCH) -> list[dict[str, str]]:
    draw = random.Random(0)
    return [{"prompt": sentence(draw), "response": sentence(draw)} for _ in range(count)]


def dialogues(count: int = STEPS * BATCH) -> list[dict[str, Any]]:
    """Return conversations of one to three turns of each side."""
    draw = random.Random(2)
    return [
        {"messages": [{"role": role, "content": sentence(draw, 4)}
                      for _ in range(draw.randint(1, 3)) for role in ("user", "assistant")]}
        for _ in range(count)
    ]  # fmt: skip


def preferences(count: int = STEPS * BATCH) -> list[dict[str, str]]:
    """Return pairs whose responses differ in their first word and mostly in their length, with nothing to learn."""
    draw = random.Random(1)
    rows = []
    for _ in range(count):
        first, second = draw.sample(WORDS, 2)
        rows.append({"prompt": sentence(draw), "chosen": f"{first} {sentence(draw)}"})
        rows[-1]["rejected"] = f"{second} {sentence(draw)}"
    return rows


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with TRL's names and its prompt and responses as messages."""
    names = {"prompt": "prompt", "response": "completion", "chosen": "chosen", "rejected": "rejected"}
    found = {key: value for key, value in row.items() if key not in names}
    for key, name in names.items():
        if key in row:
            role = "user" if key == "prompt" else "assistant"
            found[name] = [{"role": role, "content": row[key]}]
    if "text" in row:
        found["text"] = f"<|bos|>{row['text']}"  # we put it there ourselves
    return found


def in_our_order(data: Any, rows: Sequence[dict[str, Any]]) -> Dataset:
    """Return TRL's data set with the rows in the order in which our data module takes them."""
    data.setup()
    order = [row for micro in data._plan() for row in micro.rows]
    assert sorted(order) == list(range(len(rows)))
    return Dataset.from_list([conversation(rows[i]) for i in order])


def our_tokens(data: Any) -> list[Any]:
    """Return our tokenized groups in the order in which they are learned."""
    return [data.rows["train"][row] for micro in data._plan() for row in micro.rows]
