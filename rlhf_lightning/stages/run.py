"""One stage, from a composed configuration to its result."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import disable_possible_user_warnings
from omegaconf import DictConfig
from rich.console import Console
from transformers.utils import logging as hf_logging

from rlhf_lightning.callbacks.loggers import quiet_writer_threads
from rlhf_lightning.errors import UserError
from rlhf_lightning.runtime.memory import AUTO
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.runtime.settings import task_overrides
from rlhf_lightning.runtime.stage import Stage
from rlhf_lightning.stages import STAGES


def run_stage(cfg: DictConfig) -> float | None:
    """Run the stage `cfg` describes and return its monitored metric."""
    quiet()
    stage = STAGES[cfg.stage]
    if cfg.max_steps == 0 or cfg.seed < 0:
        raise UserError(f"max_steps={cfg.max_steps} must not be 0, seed={cfg.seed} not negative")
    if stage.trains and cfg.data.get("window") and cfg.max_steps < 0:
        raise UserError("data.window reads rows without end: set the length of the run with max_steps=<updates>")
    check_effects(stage, task_overrides())
    run = Run(stage, cfg, Path(HydraConfig.get().runtime.output_dir))
    finished = run.decide()
    if finished is not None:
        Console().print(f"already done: {run.folder}")
        return finished.get(str(finished.get("monitor")))
    seed_everything(cfg.seed, workers=False, verbose=False)
    try:
        return stage.load()(run)
    except torch.OutOfMemoryError as error:
        raise UserError(out_of_memory(run, str(error))) from error


def check_effects(stage: Stage, overrides: Sequence[str]) -> None:
    """Raise a UserError for what the command line sets and this stage has no use for; a pipeline gives it to all."""
    if os.environ.get("RLHF_PIPELINE_STAGE"):
        return
    for key in (override.lstrip("+").partition("=")[0] for override in overrides):
        if key.startswith("card.") and not stage.trains:
            raise UserError(f"{key} is of the model that a run writes, and stage={stage.name} writes none")
        if key.startswith("callbacks.histograms.") and not stage.online:
            raise UserError(f"{key} is of rollouts, and stage={stage.name} has none")


def out_of_memory(run: Run, error: str) -> str:
    """Return what to change when the device has too little memory."""
    stage, name = run.stage, run.stage.name
    changes = []
    if stage.trains and not stage.online:
        given = run.settings["trainer"]["accumulate_grad_batches"]
        parts = given if given != AUTO else 1  # not yet chosen
        changes.append(f"trainer.accumulate_grad_batches={2 * parts} (now {parts}) splits a step, same result")
    if stage.online:
        tokens = run.options["microbatch_tokens"]
        changes.append(
            f"{name}.microbatch_tokens={tokens // 2} (now {tokens}) reads fewer tokens at a time, same result"
        )
    if stage.trains:
        changes.append("model.load.gradient_checkpointing=true recomputes activations")
    if not stage.trains or stage.online:
        tokens = run.settings["sampler"].get("batch_tokens")
        changes += [f"sampler.batch_tokens={tokens // 2} (now {tokens}) samples fewer at a time"] if tokens else []
    hint = "; plan=true shows what needs the memory" if stage.trains else ""
    reason = error.partition(" Of the allocated")[0].partition(" See documentation")[0]
    return f"out of device memory in stage={name}: {', or '.join(changes)}{hint} ({reason})"


def quiet() -> None:
    """Silence warnings that a user cannot act on."""
    disable_possible_user_warnings()
    quiet_writer_threads()
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
