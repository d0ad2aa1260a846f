"""What TensorBoard shows beside scalars: the HParams tab and sampled text."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams as summaries

from rlhf_lightning.errors import UserError
from rlhf_lightning.files import write_jsonl
from rlhf_lightning.generation.local import Sampler
from rlhf_lightning.ops.groups import Group, pack

log = logging.getLogger(__name__)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def clean(text: str, limit: int = 600) -> str:
    """Return `text` without control characters, cut to `limit` characters, safe inside a Markdown fence."""
    text = CONTROL.sub("�", text).replace("```", "'''")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def tensorboard(trainer: Trainer) -> Any:
    """Return the run's SummaryWriter, or None without a TensorBoard logger or on another rank."""
    if not trainer.is_global_zero:
        return None
    found = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return found[0].experiment if found else None


def judged_by(monitor: str, metrics: Mapping[str, Any]) -> str | None:
    """Return the metric a run is judged by: `monitor`, or without held-out rows its training counterpart."""
    training = {"val/loss": "train/loss", "val/accuracy": "train/accuracy", "val/reward": "reward/proxy"}
    return next((name for name in (monitor, training.get(monitor)) if name in metrics), None)


def write_hparams(trainer: Trainer, hparams: dict[str, Any], metric: str | None, value: float) -> None:
    """Fill the HParams tab with a run's hyperparameters and its final metric.

    TensorBoard takes its columns from the first experiment record it finds and only lists metrics that are in it, so it
    is written once, at the end, and by a trial of a sweep not at all: that record is the sweep's.

    Args:
        hparams: flat dict; what is not a primitive is written as text.
        metric: name and value of what the run is judged by; None writes nothing.
    """
    writer = tensorboard(trainer)
    if writer is None or metric is None:
        return
    kept = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in hparams.items()}
    experiment, *session = summaries(kept, {f"hparams/{metric}": value})
    for record in session if "RLHF_TRIAL" in os.environ else (experiment, *session):
        writer._get_file_writer().add_summary(record)
    writer.add_scalar(f"hparams/{metric}", value, trainer.global_step)
    writer.flush()


class Samples(Callback):
    """Writes prompts and responses to `samples/` and to TensorBoard's text tab: at the start, now and then, at the end.

    PPO gives its own rollouts, the first of them made before it learned anything; SFT and DPO answer the first
    held-out (else training) prompts; reward models score the responses to them.

    Args:
        folder: where step_<n>.jsonl files go.
        every_n_steps: updates between two sets.
        count: prompts a set.
        max_new_tokens: longest response.
    """

    def __init__(self, folder: str | Path, every_n_steps: int = 50, count: int = 4, max_new_tokens: int = 64) -> None:
        self.folder, self.every, self.count = Path(folder), every_n_steps, count
        self.max_new_tokens, self.written_at = max_new_tokens, -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0 and not hasattr(pl_module, "samples_seen"):
            self.write(trainer, pl_module)
        elif trainer.global_step:
            self.written_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every and (self.written_at < 0 or trainer.global_step - self.written_at >= self.every):
            self.write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self.written_at:
            self.write(trainer, pl_module)

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample, then write the file and the text."""
        self.written_at = trainer.global_step
        rows = getattr(pl_module, "samples_seen", [])[: self.count] or self.sample(trainer, pl_module)
        writer = tensorboard(trainer)
        if not rows or not trainer.is_global_zero:
            return
        write_jsonl(self.folder / f"step_{trainer.global_step:06d}.jsonl", rows)
        if writer is not None:
            writer.add_text("samples", "\n\n".join(map(as_markdown, rows)), trainer.global_step)

    def sample(self, trainer: Trainer, pl_module: LightningModule) -> list[dict[str, Any]]:
        """Answer or score the first rows without touching the training's random state."""
        data = getattr(trainer, "datamodule", None)
        if data is None or not getattr(data, "rows", None):
            return []
        rows = data.rows.get("val") or data.rows["train"]
        groups = [rows[i] for i in range(min(self.count, len(rows)))]
        with torch.random.fork_rng():
            if hasattr(pl_module, "scorer"):
                return scored(groups, data, pl_module)
            try:
                return self.answered(groups, data, pl_module) if hasattr(pl_module, "policy") else []
            except UserError as error:  # a model that can be trained but not sampled from
                log.warning("no samples are written: %s", error)
                return []

    def answered(self, groups: Sequence[Group], data: Any, pl_module: Any) -> list[dict[str, Any]]:
        """Return a sampled answer to each prompt."""
        sampler = Sampler(pl_module.policy.lm, data.template.eos_ids, self.max_new_tokens)
        drawn = sampler([list(group.prompt) for group in groups], 1, ("samples",))
        return [
            {"prompt": data.tokenizer.decode(g.prompt), "response": data.template.decode(r), "finished": f}
            for g, r, f in zip(groups, drawn.responses, drawn.finished, strict=True)
        ]


@torch.no_grad()
def scored(groups: Sequence[Group], data: Any, pl_module: Any) -> list[dict[str, Any]]:
    """Return every response of `groups` with its rank, 0 the preferred one, and its score."""
    training = pl_module.training
    batch = pack(groups, layout=pl_module.layout).to(pl_module.device)
    scores = pl_module.eval().scorer(batch).tolist()
    pl_module.train(training)
    texts = [
        {"prompt": data.tokenizer.decode(group.prompt), "response": data.template.decode(response)}
        for group in groups
        for response in group.responses
    ]
    ranks = batch.ranks.tolist()
    return [text | {"rank": r, "score": s} for text, r, s in zip(texts, ranks, scores, strict=True)]


def as_markdown(row: dict[str, Any]) -> str:
    """Return one sample as fenced text: it may hold anything a model can write."""
    rest = ", ".join(
        f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}"
        for k, v in row.items()
        if k not in ("prompt", "response")
    )
    return f"```\n{clean(row['prompt'])}\n---\n{clean(row['response'])}\n```\n{rest}"
