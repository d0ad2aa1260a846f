"""Preferences and demonstrations a decoder of two layers learns in a second, and a Trainer that is quiet about it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.ops.groups import Group, pack
from tests.helpers.models import tiny_config

WORDS = ["red", "green", "blue", "white", "black", "amber", "cyan", "olive"]
WORDS += ["pink", "teal", "brown", "grey", "lime", "navy", "ruby", "gold"]


def demonstrations(count: int = 16) -> list[dict[str, str]]:
    """Return rows whose answer cannot be guessed from the prompt: they can only be memorised."""
    return [{"prompt": f"say {WORDS[i]}", "response": " ".join(WORDS[(i * k) % 16] for k in (3, 5, 7))}
            for i in range(count)]  # fmt: skip


def preferences(count: int = 32) -> list[dict[str, str]]:
    """Return pairs in which the response with "gold" is the better one."""
    return [{"prompt": f"name {WORDS[i % 15]}", "chosen": f"{WORDS[(i * 7) % 15]} gold",
             "rejected": f"{WORDS[(i * 7) % 15]} {WORDS[(i * 11 + 1) % 15]}"} for i in range(count)]  # fmt: skip


def start(folder: Path) -> str:
    """Write a tiny decoder whose tokenizer knows the words."""
    texts = [" ".join(WORDS), *(f"{a} {b}" for a in ("say", "name") for b in WORDS)]
    return build_tiny(folder / "start", texts * 3, vocab_size=330, hidden_size=32, layers=2, heads=2)


def lm(**changes: object) -> LlamaForCausalLM:
    """Return the same random decoder every time, in float64."""
    torch.manual_seed(1)
    return LlamaForCausalLM(tiny_config(**changes)).double()


def classifier() -> LlamaForSequenceClassification:
    """Return the same random one-output classifier every time, in float64."""
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(tiny_config(num_labels=1)).double()
    torch.nn.init.normal_(model.score.weight, std=0.5)
    return model


def sgd(lr: float = 0.1) -> Any:
    """Return an optimizer whose step is the gradient."""
    return partial(torch.optim.SGD, lr=lr)


def adam(lr: float = 1e-2) -> Any:
    """Return AdamW as the stages call it."""
    return partial(torch.optim.AdamW, lr=lr)


def fit(module: LightningModule, data: LightningDataModule, steps: int, accumulate: int = 1, **options: Any) -> Trainer:
    """Train for `steps` updates, validate, and return the Trainer."""
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulate,
        use_distributed_sampler=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer


class Batches(LightningDataModule):
    """Lists of groups: each of `train` is a microbatch of one step, each of `val` a held-out batch."""

    def __init__(self, train: Sequence[Sequence[Group]] = (), val: Sequence[Sequence[Group]] = ()) -> None:
        super().__init__()
        self.rows, self.steps_per_epoch = {}, 1
        # weights that make a mean over the step of sums over microbatches, after Lightning's mean over microbatches
        tokens = sum(group.loss_tokens for part in train for group in part)
        weights = {"per_token": len(train) / max(tokens, 1), "per_group": len(train) / max(sum(map(len, train)), 1)}
        self.train, self.val = [pack(part, **weights) for part in train], [pack(part) for part in val]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, batch_size=None)  # type: ignore[arg-type]


def validate(module: LightningModule, batches: Sequence[Sequence[Group]]) -> dict[str, float]:
    """Return what a module logs on held-out batches, without training."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (metrics,) = trainer.validate(module, Batches(val=batches), verbose=False)
    return {name: float(value) for name, value in metrics.items()}


def assert_wilson(low: float, high: float, share: float, n: int) -> None:
    """Assert that both ends are Wilson's: the shares p that lie 1.96 of their own standard errors from `share`."""
    assert low < share < high
    for p in (low, high):
        assert (p - share) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, rel=1e-5)


def response_logprob(
    model: LlamaForCausalLM, prompt: list[int], response: list[int], temperature: float = 1.0
) -> Tensor:
    """Return log pi of each token of `response` after `prompt`, one plain forward pass."""
    logprobs = (model(torch.tensor([[*prompt, *response]])).logits[0] / temperature).log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return torch.stack([logprobs[i, t] for i, t in zip(places, response, strict=True)])
