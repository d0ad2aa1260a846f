"""Model folders written during a run."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.models.ends import set_eos
from rlhf_lightning.models.folder import write_model


def write_trained(folder: str | Path, model: Any, tokenizer: Any, template: Any, manifest: dict[str, Any]) -> None:
    """Write a trained model as `folder`; what was learned as the end of a turn stops a plain `generate`, too."""
    if isinstance(template, Template):
        tokenizer.chat_template = template.exported
        set_eos(model, tokenizer, template.ends)
    write_model(folder, model, tokenizer, manifest)


class ModelFolders(Callback):
    """Writes the model as it is every `every_n_steps` optimizer updates, as `step_<n>` in `folder`.

    They are model folders like the one at the end, from which a stage can start; checkpoints only resume a run.

    Args:
        folder: where they go.
        every_n_steps: updates between two; PPO's are those of a whole iteration.
        stage: the stage that trains, which the manifest names.
    """

    def __init__(self, folder: str | Path, every_n_steps: int, stage: str) -> None:
        check_number("callbacks.models.every_n_steps", every_n_steps, "[1, inf)", whole=True)
        self.folder, self.every, self.stage = Path(folder), every_n_steps, stage
        self.written_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.written_at = trainer.global_step
        if not hasattr(trainer.datamodule, "tokenizer"):  # type: ignore[attr-defined]
            raise UserError(
                "callbacks=models writes the tokenizer of the data module beside the model, and this has none"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step // self.every == self.written_at // self.every:
            return
        self.written_at = step
        model: Any = pl_module.export_model()  # type: ignore[operator] # of a sharded model every rank has a part
        if trainer.is_global_zero:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            manifest = {"stage": self.stage, "metrics": {"global_step": step}}
            tokenizer = deepcopy(data.tokenizer)  # the run goes on with its own
            folder = self.folder / f"step_{step:06d}"
            write_trained(folder, model, tokenizer, getattr(data, "template", None), manifest)
