"""A bandit for PPO: a tiny model, prompts without a tokenizer, and a Trainer that keeps what was logged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_lightning.modules.ppo import PPO
from rlhf_lightning.modules.rollout import Rollout
from rlhf_lightning.ops.groups import Group, GroupList
from tests.helpers.models import tiny_config

VOCAB, GOOD = 16, 7


def config(**changes: object) -> LlamaConfig:
    return tiny_config(**({"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1} | changes))


def load(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(config(**changes))


def load_critic() -> LlamaForSequenceClassification:
    torch.manual_seed(4)
    return LlamaForSequenceClassification(config(num_labels=1))


class Ids:
    """A template whose text is the token ids."""

    eos_ids = frozenset({2})

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(i) for i in ids)


class Prompts(LightningDataModule):
    """The same `size` prompts for a given number of iterations."""

    def __init__(self, iterations: int, size: int = 16, ptx: GroupList | None = None, val: bool = False) -> None:
        super().__init__()
        self.template = Ids()
        prompts = [[1, 3 + i % 4, 5 + i % 3] for i in range(size)]
        groups = [Group(p, [], index=i, text=str(p), metadata={"row": i}) for i, p in enumerate(prompts)]
        batch = GroupList(groups, ptx=ptx)
        self.batches, self.val, self.steps_per_epoch = [batch] * iterations, val, iterations

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(self.batches[:1], batch_size=None) if self.val else []  # type: ignore[arg-type]


class History(Callback):
    """Keeps what every iteration logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.validation: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}


def good_share(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
    """Reward the share of tokens that are the good one."""
    return [text.split().count(str(GOOD)) / len(text.split()) for text in responses]


def build(loader: Callable[[], Any] = load, lr: float = 3e-2, **options: Any) -> PPO:
    settings: dict[str, Any] = {"reward": good_share, "max_new_tokens": 4, "missing_eos_penalty": 0.0}
    return PPO(loader, partial(torch.optim.AdamW, lr=lr, eps=1e-5), **(settings | options))


def fit(module: PPO, data: Prompts, **options: Any) -> History:
    history = History()
    callbacks = [history, *options.pop("callbacks", [])]
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, num_sanity_val_steps=0,
        **({} if data.val else {"limit_val_batches": 0}), **options,
    )  # fmt: skip
    trainer.fit(module, data)
    return history


def weights(module: PPO) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def two_responses(module: PPO, finished: Sequence[bool] = (True, False)) -> Rollout:
    """One prompt with responses of 2 and 3 tokens, scores 1 and -2, and log-probabilities chosen by hand."""
    module.configure_model()
    groups = [Group([1, 3], [[4, 2], [5, 6, 7]])]
    rollout = Rollout(groups, 2, torch.tensor(finished), torch.tensor([1.0, -2.0]), "packed", torch.device("cpu"), 4096)
    rollout.tokens["old_logprobs"] = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]])
    rollout.tokens["ref_logprobs"] = torch.tensor([[-2.0, -1.5, 0.0], [-1.0, -3.0, -1.0]])
    rollout.tokens["values"] = torch.tensor([[0.5, 0.25, 0.0], [0.0, 1.0, -1.0]])
    return rollout


def attached(**options: Any) -> PPO:
    """A module that believes in a Trainer of one process."""
    module = build(**options)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    return module


class KeepWeights(Callback):
    """Writes the trained weights, which a spawned rank cannot hand back."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), self.path)


class Split(Prompts):
    """Gives five prompts to the first rank and eleven to the second, and two demonstrations and the others."""

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        whole, size = self.batches[0].groups, len(self.batches[0])
        ranges = [range(size)] if self.trainer.world_size == 1 else [range(5), range(5, size)]
        chosen = ranges[self.trainer.global_rank]
        ptx = self.batches[0].ptx.groups if self.batches[0].ptx else []
        mine = ptx if self.trainer.world_size == 1 else [ptx[0:3:2], [*ptx[1:3:2], *ptx[3:]]][self.trainer.global_rank]
        part = GroupList([whole[i] for i in chosen], ptx=GroupList(mine) if ptx else None)
        return DataLoader([part] * len(self.batches), batch_size=None)  # type: ignore[arg-type]
