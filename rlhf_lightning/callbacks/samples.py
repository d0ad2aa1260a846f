"""Prompts and responses of a run as text, in its folder and its loggers."""

from __future__ import annotations

import logging
import re
import textwrap
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

from rlhf_lightning.callbacks.loggers import log_table
from rlhf_lightning.errors import UserError
from rlhf_lightning.files import write_jsonl
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.modules.base import StageModule

log = logging.getLogger(__name__)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def clean(text: str, limit: int = 600) -> str:
    """Return `text` without control characters, cut to `limit` characters, safe inside a Markdown fence."""
    text = CONTROL.sub("�", text).replace("```", "'''")
    return text if len(text) <= limit else text[: limit - 1] + "…"


class Samples(Callback):
    """Writes what `StageModule.text_samples` returns to a folder and to the loggers that take text, during the run.

    At the start or as soon as there are any, every `every_n_steps` updates, and at the end.

    Args:
        folder: where step_<n>.jsonl files go.
        every_n_steps: updates between two sets.
        count: prompts per set.
        max_new_tokens: longest response.
        sampler: generates the responses of SFT and DPO; None is a :class:`LocalEngine`.
    """

    def __init__(
        self,
        folder: str | Path,
        every_n_steps: int = 50,
        count: int = 4,
        max_new_tokens: int = 64,
        sampler: Engine | None = None,
    ) -> None:
        self.folder, self.every, self.count = Path(folder), every_n_steps, count
        self.max_new_tokens, self.written_at = max_new_tokens, -1
        self.engine = LocalEngine() if sampler is None else sampler

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step:  # resumed
            self.written_at = trainer.global_step
        else:
            self.write(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every and (self.written_at < 0 or trainer.global_step - self.written_at >= self.every):
            self.write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        averaged = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.global_step > self.written_at or averaged:  # other weights than after the last update
            self.write(trainer, pl_module)

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file and the text, of a module that has samples now."""
        if not isinstance(pl_module, StageModule):
            return
        try:
            rows = pl_module.text_samples(self.count, self.max_new_tokens, self.engine)
        except UserError as error:  # a model that can be trained but not sampled from
            self.written_at = trainer.global_step
            log.warning("no samples are written: %s", error)
            return
        if not rows:
            return
        self.written_at = trainer.global_step
        if not trainer.is_global_zero:
            return
        write_jsonl(self.folder / f"step_{trainer.global_step:06d}.jsonl", rows)
        for logger in trainer.loggers:
            log_table(logger, "samples", rows, "\n\n".join(map(as_markdown, rows)), trainer.global_step)


def as_markdown(row: dict[str, Any]) -> str:
    """Return one sample as fenced text: a model can write anything. Long lines, which TensorBoard cuts, are wrapped."""

    def shown(text: str) -> str:
        lines = clean(text).split("\n")
        return "\n".join(textwrap.fill(line, 88, replace_whitespace=False, drop_whitespace=False) for line in lines)

    rest = ", ".join(
        f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}"
        for k, v in row.items()
        if k not in ("prompt", "response")
    )
    return f"```\n{shown(row['prompt'])}\n---\n{shown(row['response'])}\n```\n{rest}"
