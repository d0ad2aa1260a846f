"""One stage: from a composed configuration to a model folder."""

from __future__ import annotations

import logging
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_lightning.files import fingerprint, readable_os_errors, write_json
from rlhf_lightning.models.folder import parent_entry, write_model

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import disable_possible_user_warnings, rank_zero_only
from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as hf_logging

from rlhf_lightning.callbacks.checkpoints import AtomicCheckpointIO
from rlhf_lightning.callbacks.progress import LineProgress, progress_bar
from rlhf_lightning.callbacks.stop import Stop
from rlhf_lightning.callbacks.tensorboard import judged_by, write_hparams
from rlhf_lightning.callbacks.throughput import Throughput
from rlhf_lightning.data.sources import read_source, texts_of
from rlhf_lightning.data.tokenize import report_skipped
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.models.loading import (
    context_length,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    resolve_model,
)
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.rewards.loading import load_reward
from rlhf_lightning.runtime import config
from rlhf_lightning.runtime.launch import check_devices, decide_run, environment

log = logging.getLogger(__name__)
console = Console()


def run_stage(cfg: DictConfig) -> float | None:
    """Run the stage `cfg` describes and return its monitored metric."""
    quiet()
    run = Path(HydraConfig.get().runtime.output_dir)
    start = starting_point(cfg)
    if cfg.max_steps == 0 or cfg.seed < 0:
        raise UserError(f"max_steps={cfg.max_steps} must not be 0, seed={cfg.seed} not negative")
    if cfg.data.get("window") and cfg.max_steps < 0 and cfg.stage not in ("evaluate", "audit", "candidates"):
        raise UserError("data.window reads rows without end: say how long the run is, with max_steps=<updates>")
    identity = {
        "config": config.identity(cfg),
        "parents": [parent_entry(*p)["weights"] for p in config.parents(cfg, start)],
        "data": config.data_keys(cfg),
        "code": config.code_keys(cfg),
    }
    run, checkpoint, finished = decide_run(run, cfg.stage, cfg.resume and str(cfg.resume), fingerprint(identity))
    if finished is not None:
        console.print(f"already done: {run}")
        return finished.get(str(finished.get("monitor")))
    with open_dict(cfg):
        cfg.paths.run = str(run)
    seed_everything(cfg.seed, workers=False, verbose=False)
    allow = list(cfg.allow_targets)
    if cfg.stage == "evaluate":
        from rlhf_lightning.evaluation.policy import run_evaluate

        return run_evaluate(*evaluated(cfg, run, start), partial(config.instantiate, cfg.data, "data", allow))
    folder = start or build_start(cfg, run)
    if cfg.stage == "audit":
        from rlhf_lightning.stages.audit import run_audit

        node = config.audited_data(cfg, HydraConfig.get().runtime.choices["data"])
        return run_audit(config.plain(cfg), run, folder, partial(config.instantiate, node, "data", allow))
    tokenizer = load_tokenizer(folder)
    data = config.instantiate(cfg.data, "data", allow, tokenizer=tokenizer)
    data.limit_length(context_length(folder))
    data.setup("fit")
    module = build_module(cfg, folder)
    throughput, trainer = build_trainer(cfg)
    if cfg.stage == "candidates":
        from rlhf_lightning.stages.candidates import run_candidates

        if rank_zero_only.rank == 0:
            report_skipped(data)
        return run_candidates(run, trainer, module, data, cfg.monitor)  # type: ignore[arg-type]
    announce(cfg, run, folder, data, checkpoint)
    fit(trainer, module, data, checkpoint)
    return finish(cfg, run, folder, identity, trainer, module, data, throughput)


def evaluated(cfg: DictConfig, run: Path, start: str | None) -> tuple[dict[str, Any], Path, dict[str, str]]:
    """Return the plain settings, the run folder and the models to evaluate: name -> folder or hub name."""
    settings = config.plain(cfg)
    options = settings["evaluate"]
    if options["reference"]:
        options["reference"] = resolve_model(str(options["reference"]), cfg.paths.cache)
    models = {name: resolve_model(str(model), cfg.paths.cache) for name, model in options["models"].items()}
    return settings, run, ({"model": start} if start else {}) | models


def starting_point(cfg: DictConfig) -> str | None:
    """Return the folder or hub name to start from, or None where a tiny model is to be made."""
    if cfg.init_from:
        return resolve_model(str(cfg.init_from), cfg.paths.cache)
    if cfg.model.name == "tiny":
        return None
    return resolve_model(str(cfg.model.name), cfg.paths.cache)


def build_start(cfg: DictConfig, run: Path) -> str:
    """Make the tiny model and its tokenizer from the training texts."""
    if cfg.stage not in ("sft", "reward", "dpo", "audit"):
        raise UserError(f"stage={cfg.stage} needs a model to start from: init_from=<folder or hub name>")
    settings = config.plain(cfg)
    source = settings["data"]["train"]
    stream = settings["data"].get("window") is not None
    kinds = ["corpus", "demonstrations"] if source == "world" else [""]
    world = {"seed": cfg.seed} | (settings["data"].get("world") or {})
    sources = [read_source(source, "train", 20_000, kind, {**world, "records": None}, stream=stream) for kind in kinds]
    texts = (text for found in sources for _, row in found.rows() for text in texts_of(row))
    return build_tiny(run / "init", texts, seed=cfg.seed, **settings["model"]["build"])


def build_module(cfg: DictConfig, folder: str) -> LightningModule:
    """Build the stage's LightningModule; models are loaded later, by `configure_model`."""
    settings = config.plain(cfg)
    load = settings["model"]["load"]
    options = dict(settings[cfg.stage])
    allow = list(cfg.allow_targets)
    loader = partial(load_causal_lm, folder, **load)
    if cfg.stage == "reward":
        loader = partial(load_scalar_model, folder, seed=cfg.seed, **load)
    if cfg.stage == "candidates":
        options |= {"seed": cfg.seed, "sampler": config.instantiate(cfg.sampler, "sampler", allow)}
        options["reward"] = load_reward(settings["reward_from"], load["dtype"]) if settings["reward_from"] else None
    if cfg.stage in ("ppo", "rloo", "grpo"):
        if not cfg.reward_from:
            raise UserError("reward_from is needed: a reward model folder, module:function, or world")
        options |= {"seed": cfg.seed, "reward": load_reward(settings["reward_from"], load["dtype"])}
        if options["ptx_coef"] and not settings["data"].get("ptx"):
            raise UserError(f"{cfg.stage}.ptx_coef needs demonstrations: data.ptx=<file>")
        options["gold"] = load_reward(cfg.gold_from) if cfg.gold_from else None
        options["sampler"] = config.instantiate(cfg.sampler, "sampler", allow)
        critic = options.pop("critic", "value_head")
        if critic not in ("value_head", "reward"):
            kinds = ("value_head", "reward")
            raise UserError(f"ppo.critic={critic!r} is not one of {', '.join(kinds)}.{nearest(critic, kinds)}")
        if critic == "reward":
            if not Path(str(cfg.reward_from)).is_dir():
                raise UserError("ppo.critic=reward needs reward_from=<reward model folder>")
            if load_tokenizer(folder).get_vocab() != load_tokenizer(cfg.reward_from).get_vocab():
                raise UserError("ppo.critic=reward: policy and reward model have different tokenizers")
            options["load_critic"] = partial(load_scalar_model, str(cfg.reward_from), trained=True, **load)
        if cfg.trainer.accumulate_grad_batches != 1 or cfg.trainer.gradient_clip_val:
            raise UserError(
                f"{cfg.stage} accumulates and clips by itself: leave trainer.accumulate_grad_batches at 1, "
                f"trainer.gradient_clip_val at null; use {cfg.stage}.microbatch_tokens and {cfg.stage}.max_grad_norm"
            )
    return config.instantiate(
        cfg.module,
        "module",
        allow,
        load=loader,
        optimizer=config.instantiate(cfg.optimizer, "optimizer", allow),
        schedule=config.instantiate(cfg.schedule, "schedule", allow),
        lora=settings["adapter"],
        **options,
    )


def build_trainer(cfg: DictConfig) -> tuple[Throughput | None, Trainer]:
    """Build the Trainer with its callbacks, logger and strategy."""
    allow = list(cfg.allow_targets)
    callbacks = [
        config.instantiate(node, f"callbacks.{name}", allow) for name, node in (cfg.callbacks or {}).items() if node
    ]
    callbacks.insert(0, Stop())
    bar = progress_bar()
    callbacks.append(bar)
    if str(cfg.trainer.precision) in ("16", "16-mixed", "16-true"):
        raise UserError(f"trainer.precision={cfg.trainer.precision} overflows in RLHF losses; use bf16-mixed")
    check_devices(config.plain(cfg)["trainer"])
    strategy = cfg.strategy if isinstance(cfg.strategy, str) else config.instantiate(cfg.strategy, "strategy", allow)
    steps = cfg.val_every_n_steps
    trainer = config.instantiate(
        cfg.trainer,
        "trainer",
        allow,
        callbacks=callbacks,
        logger=config.instantiate(cfg.logger, "logger", allow) if cfg.logger else False,
        strategy=strategy,
        plugins=[AtomicCheckpointIO(), *environment()],
        enable_progress_bar=not isinstance(bar, LineProgress),
        val_check_interval=steps * cfg.trainer.accumulate_grad_batches if steps else None,
        check_val_every_n_epoch=None if steps else 1,
    )
    return next((c for c in callbacks if isinstance(c, Throughput)), None), trainer


def fit(trainer: Trainer, module: LightningModule, data: LightningDataModule, checkpoint: Path | None) -> None:
    """Train; then validate once more unless the last step just was."""
    stops = [callback for callback in trainer.callbacks if isinstance(callback, Stop)]  # type: ignore[attr-defined]
    try:
        with readable_os_errors(trainer.default_root_dir):
            trainer.fit(module, data, ckpt_path=str(checkpoint) if checkpoint else None)
    except SystemExit:  # what Lightning makes of an interrupt
        if not any(stop.received for stop in stops):
            raise
    for stop in stops:
        if stop.received is not None:
            raise KeyboardInterrupt(128 + stop.received)
    if "val" in data.rows and module.validated_at != trainer.global_step:  # type: ignore[attr-defined]
        kept = dict(trainer.callback_metrics)
        trainer.validate(module, data, verbose=False)
        trainer.callback_metrics.update({k: v for k, v in kept.items() if k not in trainer.callback_metrics})


def finish(
    cfg: DictConfig,
    run: Path,
    folder: str,
    identity: dict[str, Any],
    trainer: Trainer,
    module: Any,
    data: Any,
    throughput: Throughput | None,
) -> float | None:
    """Write the model folder and metrics.json, and say where they are."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    metrics |= throughput.summary if throughput else {}
    metrics |= {"global_step": trainer.global_step}
    monitor = judged_by(cfg.monitor, metrics)
    judged = metrics[monitor] if monitor else None
    model = module.export_model()  # of a sharded model every rank has a part
    if not trainer.is_global_zero:
        return judged
    if monitor is None:
        hint = nearest(cfg.monitor, metrics)
        console.print(f"monitor={cfg.monitor} was not logged.{hint}", style="yellow", soft_wrap=True)
    hparams = {key: value for key, value in config.flat(identity["config"]).items() if not key.endswith("_")}
    write_hparams(trainer, hparams, monitor, judged or 0.0)
    manifest = {
        "stage": cfg.stage,
        "parents": [
            parent_entry("init", folder),
            *(parent_entry(*p) for p in config.parents(cfg, None)),
        ],
        "fingerprint": fingerprint(identity),
        "config": fingerprint(identity["config"]),
        "data": {split: rows.key for split, rows in data.rows.items()},
        "seed": cfg.seed,
        "metrics": metrics,
    }
    tokenizer = data.tokenizer
    tokenizer.chat_template = data.template.exported
    write_json(run / "metrics.json", {"monitor": monitor, **metrics})
    write_model(run / "model", model, tokenizer, manifest)
    table = Table(title=f"{cfg.stage} done", show_header=False)
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.4g}")
    console.print(table)
    console.print(f"model       {run / 'model'}", soft_wrap=True)
    console.print(f"tensorboard --logdir {run}", soft_wrap=True)
    return judged


def announce(cfg: DictConfig, run: Path, folder: str, data: Any, checkpoint: Path | None) -> None:
    """Say what starts, in a few lines."""
    if rank_zero_only.rank != 0:
        return
    report_skipped(data)
    sizes = ", ".join(f"{len(rows)} {split} rows" for split, rows in data.rows.items())
    console.print(f"[bold]{cfg.stage}[/bold] from {folder}", soft_wrap=True)
    pace = f"windows of {data.window} rows" if data.window else f"{data.steps_per_epoch} steps an epoch"
    console.print(f"  {sizes}, {pace}; writing {run}", soft_wrap=True)
    if checkpoint:
        step = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        console.print(f"  resuming at step {step}")


def quiet() -> None:
    """Silence what a user cannot act on."""
    disable_possible_user_warnings()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    for name in (
        "utilities.rank_zero",
        "trainer.connectors.checkpoint_connector",
        "trainer.connectors.signal_connector",
    ):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*|Couldn't infer the batch indices.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
