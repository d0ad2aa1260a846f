"""What the training stages share: data module, Trainer, fit, and the model folder at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from rlhf_lightning.callbacks.checkpoints import (
    AtomicCheckpointIO,
    StepCheckpoint,
    is_restoring,
    kept_microbatches,
    resumed_step,
)
from rlhf_lightning.callbacks.loggers import judged_by, log_settings, write_charts, write_hparams
from rlhf_lightning.callbacks.models import write_trained
from rlhf_lightning.callbacks.notices import Notices
from rlhf_lightning.callbacks.progress import LineProgress, progress_bar
from rlhf_lightning.callbacks.stop import Stop, interrupted_at_once, interruptible
from rlhf_lightning.callbacks.throughput import Throughput
from rlhf_lightning.data.base import RowData
from rlhf_lightning.data.sources import is_local
from rlhf_lightning.data.tokenize import report_rows
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.files import fingerprint, readable_os_errors, write_json
from rlhf_lightning.models.folder import parent_entry
from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.modules.trainer import check_precision
from rlhf_lightning.runtime.launch import check_devices, environment
from rlhf_lightning.runtime.libraries import readable_library_errors
from rlhf_lightning.runtime.memory import AUTO
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.runtime.secrets import redacted
from rlhf_lightning.runtime.settings import DATA_SPLITS, flat, identity
from rlhf_lightning.stages.microbatches import split_steps

console = Console()
EXPORTS = ("last", "best")


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
    if run.settings["export"] not in EXPORTS:
        raise UserError(f"export={run.settings['export']} is not one of: {', '.join(EXPORTS)}")
    data = run.data(folder)
    if isinstance(data, RowData):
        data.setup("fit")
    module = run.module(load, **options)
    split_steps(run, data, kept_microbatches(run.checkpoint) if run.checkpoint else None)
    trainer = build_trainer(run)
    announce(run, folder, data)
    with readable_library_errors():
        for logger in trainer.loggers:
            log_settings(logger, hyperparameters(run))
        write_charts(trainer)
    fit(trainer, module, data, run.checkpoint, run.folder)
    if run.settings["export"] == "best":
        restore_best(trainer, module, data, run.folder)
    with readable_os_errors(run.folder):
        return finish(run, folder, trainer, module, data)


def hyperparameters(run: Run) -> dict[str, Any]:
    """Return the settings that decide the result, flat, with environment variables by name."""
    return {key: value for key, value in flat(identity(redacted(run.cfg))).items() if not key.endswith("_")}


def build_trainer(run: Run, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Build the Trainer with its callbacks, loggers and strategy; `callbacks` come first."""
    settings, arguments = run.settings, run.settings["trainer"]
    configured = run.callbacks()
    if arguments["accumulate_grad_batches"] == AUTO:  # nothing is trained
        arguments["accumulate_grad_batches"] = 1
    check_arguments(arguments)
    check_devices(arguments)
    if run.settings["export"] == "best" and not best_checkpoints(configured):
        raise UserError("export=best needs a ModelCheckpoint with a monitor, which says what is best: callbacks=best")
    ours = arguments["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in configured)
    bar = progress_bar() if ours else None
    options: dict[str, Any] = {"enable_progress_bar": bar is None or not isinstance(bar, LineProgress)}
    if arguments["enable_progress_bar"] is False:
        options["enable_progress_bar"] = False
    if arguments["enable_checkpointing"] is None:
        options["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in configured)
    if steps := settings["val_every_n_steps"]:
        if arguments["val_check_interval"] is not None:
            raise UserError("val_every_n_steps and trainer.val_check_interval say the same; give one of them")
        options["val_check_interval"] = steps * arguments["accumulate_grad_batches"]
        options["check_val_every_n_epoch"] = None
    averaging = [callback for callback in configured if isinstance(callback, WeightAveraging)]
    configured = [*averaging, *(callback for callback in configured if callback not in averaging)]  # the last samples
    return run.build(
        "trainer",
        callbacks=[*callbacks, Stop(), *configured, *([bar] if bar else []), Notices()],
        logger=run.loggers() or False,
        strategy=settings["strategy"] if isinstance(settings["strategy"], str) else run.build("strategy"),
        plugins=[AtomicCheckpointIO(), *environment()],
        # elsewhere Lightning would continue a checkpoint of SLURM's that lies there
        default_root_dir=arguments["default_root_dir"] or run.folder,
        **options,
    )


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise a UserError for a value of one of the Trainer's arguments of which Lightning says less, or nothing."""
    check_precision(arguments["precision"])
    given = arguments["accumulate_grad_batches"]
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise UserError(f"trainer.accumulate_grad_batches={given} is neither {AUTO} nor a whole number of at least 1")
    for name, value in arguments.items():
        if isinstance(value, str) and name.startswith(("limit_", "min_", "max_")) and name != "max_time":
            raise UserError(f"trainer.{name}={value!r} is not a number")
    if isinstance(time := arguments["max_time"], int | float):
        raise UserError(f"trainer.max_time={time} is not a duration DD:HH:MM:SS, such as 00:01:30:00")
    if arguments["limit_train_batches"] == 0:
        raise UserError("trainer.limit_train_batches=0 trains nothing")
    if arguments["barebones"]:
        raise UserError("trainer.barebones=true leaves out loggers, checkpoints and progress, which a run here writes")


def best_checkpoints(callbacks: Iterable[Callback]) -> list[ModelCheckpoint]:
    """Return the callbacks that keep a best checkpoint."""
    return [callback for callback in callbacks if isinstance(callback, ModelCheckpoint) and callback.monitor]


def restore_best(trainer: Trainer, module: Any, data: Any, folder: Path) -> None:
    """Give the module the weights of the best checkpoint and validate them, unless the last ones are better."""
    kept = next(iter(best_checkpoints(trainer.callbacks)), None)  # type: ignore[attr-defined]
    if kept is None:  # fast_dev_run leaves it out
        return
    name, last = str(kept.monitor), trainer.callback_metrics.get(str(kept.monitor))
    better = torch.lt if kept.mode == "min" else torch.gt
    score = kept.best_model_score
    if not kept.best_model_path or score is None or (last is not None and bool(better(last.cpu(), score.cpu()))):
        if trainer.is_global_zero:
            console.print(f"the last weights are the best by {name}", soft_wrap=True)
        return
    if "val" not in getattr(data, "rows", {"val": None}):
        raise UserError("export=best validates the weights it writes: give data.val")
    # their average is in the checkpoint, and they would put the last one in its place
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
    validate(trainer, module, data, folder, kept.best_model_path)
    if trainer.is_global_zero:
        console.print(f"exported    {kept.best_model_path}, {name} {float(score):.4g}", soft_wrap=True)


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
        if (parts := run.settings["trainer"]["accumulate_grad_batches"]) > 1:
            pace += f" of {parts} microbatches"
        console.print(f"  {sizes}, {pace}; writing {run.folder}", soft_wrap=True)
    if run.checkpoint:
        console.print(f"  resuming at step {step}")


def fit(trainer: Trainer, module: LightningModule, data: Any, checkpoint: Path | None, folder: Path) -> None:
    """Train, then validate unless the last step was validated; `folder` is what the Trainer writes into."""
    try:
        with interruptible(trainer), readable_os_errors(folder), readable_library_errors():
            trainer.fit(module, data, ckpt_path=str(checkpoint) if checkpoint else None)
    except UserError:
        raise
    except Exception as error:
        if not is_restoring(error):
            raise
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        raise UserError(f"the checkpoint {checkpoint} is not of this run: {reason}") from error
    if "val" in getattr(data, "rows", {}) and module.validated_at != trainer.global_step:  # type: ignore[attr-defined]
        validate(trainer, module, data, folder)


def validate(trainer: Trainer, module: Any, data: Any, folder: Path, checkpoint: str | None = None) -> None:
    """Validate the module, with the weights of a checkpoint if there is one, and keep the metrics of training."""
    metrics = dict(trainer.callback_metrics)
    with interruptible(trainer), readable_os_errors(folder), readable_library_errors():
        trainer.validate(module, data, ckpt_path=checkpoint, verbose=False)
    trainer.callback_metrics.update({k: v for k, v in metrics.items() if k not in trainer.callback_metrics})


def source_names(data: dict[str, Any]) -> dict[str, str]:
    """Return split -> the names of its data as a model card shows them, of files without their folders."""
    splits = [key.removeprefix("data.") for key in DATA_SPLITS]
    given = {split: data[split] if isinstance(data.get(split), list) else [data.get(split)] for split in splits}
    names = {
        split: [Path(str(part)).name if is_local(part) else str(part) for part in of if part]
        for split, of in given.items()
    }
    return {split: ", ".join(of) for split, of in names.items() if of}


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
    write_hparams(trainer, hyperparameters(run), monitor, objective or 0.0)
    parents = [("init", folder), *(parent for parent in run.parents if parent[0] != "init")]
    manifest = {
        "stage": run.stage.name,
        "parents": [parent_entry(*parent) for parent in parents],
        "fingerprint": fingerprint(run.identity),
        "config": fingerprint(run.identity["config"]),
        "data": {split: rows.key for split, rows in getattr(data, "rows", {}).items()},
        "sources": source_names(redacted(run.cfg)["data"]),
        "licenses": {of: run.settings["card"][key] for of, key in (("model", "license"), ("data", "data_license"))},
        "seed": run.settings["seed"],
        "adapter": run.settings["adapter"],
        "metrics": metrics,
    }
    tokenizer = getattr(data, "tokenizer", None) or load_tokenizer(folder)
    write_trained(run.folder / "model", model, tokenizer, getattr(data, "template", None), manifest)
    write_json(run.folder / "metrics.json", {"monitor": monitor, **metrics})  # last: its stage is done
    table = Table(title=f"{run.stage.name} done", show_header=False)
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.4g}")
    console.print(table)
    console.print(f"model       {run.folder / 'model'}", soft_wrap=True)
    if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        console.print(f"tensorboard --logdir {run.folder}", soft_wrap=True)
    return objective
