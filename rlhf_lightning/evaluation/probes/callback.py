"""Probes of the model in training, every few updates."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from rlhf_lightning.data.base import RowData
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.probes.probe import Subject
from rlhf_lightning.evaluation.probes.running import as_rows, check_needs, check_settings, find_probe, run_probe
from rlhf_lightning.files import write_jsonl
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.modules.base import StageModule

log = logging.getLogger(__name__)


class Probes(Callback):
    """Runs probes on the policy of SFT, DPO and online stages: at the start, every `every_n_steps` updates, at the end.

    Metrics go to every logger as `probe/<name>/<metric>`, rows and samples to the folder. The gold and the proxy reward
    of an online stage are those that a probe measures with. Nothing of the training changes: random states and modes
    are as before.

    Args:
        folder: where step_<n>.jsonl, with the columns of tables/probes.jsonl, and step_<n>_<probe>.jsonl go.
        probes: names of the table of probes.
        every_n_steps: updates between two sets; 0 is the start and the end only.
        data: None is each probe's own set, "world" the built-in world, else a file with the columns of the one probe.
        rows: prompts per probe, at most.
        max_new_tokens, temperature: of answers.
        settings: probe -> its options.
        seed: of rows and answers.
        sampler: generates; None is a :class:`LocalEngine`.

    Raises:
        UserError: no such probe or option, or one that needs what is not there in training.
    """

    def __init__(
        self,
        folder: str | Path,
        probes: Sequence[str],
        every_n_steps: int = 100,
        data: str | None = None,
        rows: int | None = None,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int = 0,
        sampler: Engine | None = None,
    ) -> None:
        self.folder, self.every, self.data, self.rows = Path(folder), every_n_steps, data, rows
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.settings = {name: dict(options) for name, options in (settings or {}).items()}
        self.engine = LocalEngine() if sampler is None else sampler
        self.probes, self.written_at = [find_probe(name) for name in probes], -1
        if not self.probes:
            raise UserError("callbacks.probes.probes is empty: name one probe or more")
        if data not in (None, "world") and len(self.probes) > 1:
            raise UserError(f"callbacks.probes.data={data} has the columns of one probe, and several are named")
        for name in {*self.settings, *(probe.name for probe in self.probes)}:
            check_settings(find_probe(name), self.settings.get(name, {}), temperature)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (isinstance(pl_module, StageModule) and hasattr(pl_module, "policy")):
            raise UserError(f"callbacks.probes asks a language model, and {type(pl_module).__name__} trains none")
        if not isinstance(pl_module.data, RowData):
            raise UserError("callbacks.probes needs a data module of this package, whose template encodes prompts")
        if trainer.global_step:  # resumed
            self.written_at = trainer.global_step
        else:
            self.run(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every and trainer.global_step - self.written_at >= self.every:
            self.run(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self.written_at:
            self.run(trainer, pl_module)

    def run(self, trainer: Trainer, pl_module: Any) -> None:
        """Run the probes on the policy as it is now; every rank does, and the first writes."""
        step = self.written_at = trainer.global_step
        subject = Subject(
            pl_module.policy.lm,
            pl_module.data.template,
            self.engine,
            gold=getattr(pl_module, "gold", None),
            reward=getattr(pl_module, "reward", None),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            device=str(pl_module.device),
        )
        rows: list[dict[str, Any]] = []
        for probe in self.probes:
            check_needs(probe, {need for need in ("gold", "reward") if getattr(subject, need) is not None})
            pl_module.phase = f"probe {probe.name}"
            with isolate_rng():
                result = run_probe(probe.name, subject, self.data, self.rows, self.settings.get(probe.name))
            rows += as_rows("model", probe.name, result)
            if trainer.is_global_zero:
                write_jsonl(self.folder / f"step_{step:06d}_{probe.name}.jsonl", result.samples)
        pl_module.phase = ""
        if not trainer.is_global_zero:
            return
        write_jsonl(self.folder / f"step_{step:06d}.jsonl", rows)
        metrics = {f"probe/{row['probe']}/{row['metric']}": row["value"] for row in rows if row["value"] is not None}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)
        for row in rows:
            if row["alarm"]:
                log.warning("step %d: probe %s/%s: %s", step, row["probe"], row["metric"], row["alarm"])
