"""What the training stages share: data module, Trainer, fit, and the model folder at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from rlhf_lightning.callbacks.checkpoints import AtomicCheckpointIO, StepCheckpoint, is_restoring, resumed_step
from rlhf_lightning.callbacks.notices import Notices
from rlhf_lightning.callbacks.progress import LineProgress, progress_bar
from rlhf_lightning.callbacks.stop import Stop, interrupted_at_once, interruptible
from rlhf_lightning.callbacks.tensorboard import judged_by, write_hparams
from rlhf_lightning.callbacks.throughput import Throughput
from rlhf_lightning.data.base import RowData
from rlhf_lightning.data.template import Template
from rlhf_lightning.data.tokenize import report_rows
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.files import fingerprint, readable_os_errors, write_json
from rlhf_lightning.models.ends import set_eos
from rlhf_lightning.models.folder import parent_entry, write_model
from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.runtime.launch import check_devices, environment
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.runtime.secrets import redacted
from rlhf_lightning.runtime.settings import flat, identity

console = Console()


def train(run: Run, folder: str, load: Callable[[], Any], **options: Any) -> float | None:
    """Train the stage's module from the model `folder`, write the model folder, and return the monitored metric.

    Args:
        load: returns the model to train.
        options: arguments of the module.
    """
    # on the first rank; another one may wait for its peers, where no handler would run
    with interrupted_at_once() if rank_zero_only.rank == 0 else nullcontext():
        return _train(run, folder, load, **options)


def _train(run: Run, folder: str, load: Callable[[], Any], **options: Any) -> float | None:
    data = run.data(folder)
    ours = isinstance(data, RowData)
    if ours:
        data.setup("fit")
    module = run.module(load, **options)
    # ours plan whole steps over all ranks; of another's loader Lightning gives every rank its part
    trainer = build_trainer(run) if ours else build_trainer(run, use_distributed_sampler=True)
    announce(run, folder, data)
    fit(trainer, module, data, run.checkpoint, run.folder)
    with readable_os_errors(run.folder):
        return finish(run, folder, trainer, module, data)


def build_trainer(run: Run, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    """Build the Trainer with its callbacks, logger and strategy; `callbacks` come first, `options` win."""
    settings = run.settings
    bar = progress_bar()
    configured = [run.build(f"callbacks.{name}") for name, node in (settings["callbacks"] or {}).items() if node]
    if str(settings["trainer"]["precision"]) in ("16", "16-mixed", "16-true"):
        raise UserError(
            f"trainer.precision={settings['trainer']['precision']} overflows in RLHF losses; use bf16-mixed"
        )
    check_devices(settings["trainer"])
    steps = settings["val_every_n_steps"]
    return run.build(
        "trainer",
        callbacks=[*callbacks, Stop(), *configured, bar, Notices()],
        logger=run.build("logger") if settings["logger"] else False,
        strategy=settings["strategy"] if isinstance(settings["strategy"], str) else run.build("strategy"),
        plugins=[AtomicCheckpointIO(), *environment()],
        enable_progress_bar=not isinstance(bar, LineProgress),
        val_check_interval=steps * settings["trainer"]["accumulate_grad_batches"] if steps else None,
        check_val_every_n_epoch=None if steps else 1,
        # elsewhere Lightning would continue a checkpoint of SLURM's that lies there
        default_root_dir=settings["trainer"].get("default_root_dir") or run.folder,
        **options,
    )


def announce(run: Run, folder: str, data: Any) -> None:
    """Print what starts, in a few lines."""
    step = resumed_step(run.checkpoint) if run.checkpoint else 0
    if rank_zero_only.rank != 0:
        return
    console.print(f"[bold]{run.stage.name}[/bold] from {folder}", soft_wrap=True)
    if isinstance(data, RowData):
        report_rows(data)
        sizes = ", ".join(f"{len(rows)} {split} rows" for split, rows in data.rows.items())
        pace = f"windows of {data.window} rows" if data.window else f"{data.steps_per_epoch} steps per epoch"
        console.print(f"  {sizes}, {pace}; writing {run.folder}", soft_wrap=True)
    if run.checkpoint:
        console.print(f"  resuming at step {step}")


def fit(trainer: Trainer, module: LightningModule, data: Any, checkpoint: Path | None, folder: Path) -> None:
    """Train, then validate unless the last step was validated; `folder` is what the Trainer writes into."""
    try:
        with interruptible(trainer), readable_os_errors(folder):
            trainer.fit(module, data, ckpt_path=str(checkpoint) if checkpoint else None)
    except UserError:
        raise
    except Exception as error:
        if not is_restoring(error):
            raise
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        raise UserError(f"the checkpoint {checkpoint} is not of this run: {reason}") from error
    if "val" in getattr(data, "rows", {}) and module.validated_at != trainer.global_step:  # type: ignore[attr-defined]
        metrics = dict(trainer.callback_metrics)
        with interruptible(trainer), readable_os_errors(folder):
            trainer.validate(module, data, verbose=False)
        trainer.callback_metrics.update({k: v for k, v in metrics.items() if k not in trainer.callback_metrics})


def finish(run: Run, folder: str, trainer: Trainer, module: Any, data: Any) -> float | None:
    """Write the model folder and metrics.json, and print where they are."""
    metrics: dict[str, float] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        metrics |= callback.metrics if isinstance(callback, StepCheckpoint) else {}  # of a run that was resumed
    metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        metrics |= callback.summary if isinstance(callback, Throughput) else {}
    metrics |= {"global_step": trainer.global_step}
    requested = run.settings["monitor"]
    monitor = judged_by(requested, metrics)
    objective = metrics[monitor] if monitor else None
    model = module.export_model()  # of a sharded model every rank has a part
    if not trainer.is_global_zero:
        return objective
    if monitor is None:
        hint = nearest(requested, metrics)
        console.print(f"monitor={requested} was not logged.{hint}", style="yellow", soft_wrap=True)
    shown = identity(redacted(run.cfg))
    hparams = {key: value for key, value in flat(shown).items() if not key.endswith("_")}
    write_hparams(trainer, hparams, monitor, objective or 0.0)
    parents = [("init", folder), *(parent for parent in run.parents if parent[0] != "init")]
    manifest = {
        "stage": run.stage.name,
        "parents": [parent_entry(*parent) for parent in parents],
        "fingerprint": fingerprint(run.identity),
        "config": fingerprint(run.identity["config"]),
        "data": {split: rows.key for split, rows in getattr(data, "rows", {}).items()},
        "seed": run.settings["seed"],
        "metrics": metrics,
    }
    tokenizer = getattr(data, "tokenizer", None) or load_tokenizer(folder)
    template = getattr(data, "template", None)
    if isinstance(template, Template):  # what was learned as the end of a turn stops a plain `generate`, too
        tokenizer.chat_template = template.exported
        set_eos(model, tokenizer, template.ends)
    write_model(run.folder / "model", model, tokenizer, manifest)
    write_json(run.folder / "metrics.json", {"monitor": monitor, **metrics})  # last: its stage is done
    table = Table(title=f"{run.stage.name} done", show_header=False)
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.4g}")
    console.print(table)
    console.print(f"model       {run.folder / 'model'}", soft_wrap=True)
    console.print(f"tensorboard --logdir {run.folder}", soft_wrap=True)
    return objective
