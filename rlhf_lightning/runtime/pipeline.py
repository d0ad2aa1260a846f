"""An ordered list of stages, each in a process of its own: one that is done is skipped, the first failure ends it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from rlhf_lightning.data.sources import read_source
from rlhf_lightning.errors import UserError
from rlhf_lightning.files import fingerprint, read_json, write_json
from rlhf_lightning.models.folder import parent_entry
from rlhf_lightning.rewards.spec import code_key
from rlhf_lightning.runtime import config, processes
from rlhf_lightning.runtime.processes import quoted

console = Console()


def run_pipeline(cfg: DictConfig) -> None:
    """Run the stages of `cfg.pipeline` in order.

    Raises:
        UserError: naming the stage that failed and how to go on, or the stage that is a pipeline again.
    """
    if inside := os.environ.get("RLHF_PIPELINE_STAGE"):  # an experiment passed on to it may choose a pipeline
        raise UserError(f"stage {inside} of a pipeline became pipeline={config.plain(cfg)['pipeline']['name']}")
    run = Path(HydraConfig.get().runtime.output_dir)
    settings = config.plain(cfg)["pipeline"]
    given = passthrough(list(HydraConfig.get().overrides.task))
    run = find_pipeline(run, fingerprint([settings, given]), cfg.resume)
    folders: dict[str, str] = {}
    began = time.monotonic()
    stages = settings["stages"]
    for number, (name, stage) in enumerate(stages.items()):
        folder = run / f"{number}_{name}"
        overrides = stage_overrides(stage, folders, {"root": cfg.data_root, "init_from": cfg.init_from})
        starts = "init_from" in (stage.get("set") or {})  # a stage that starts from another is not asked to start anew
        overrides += [o for o in given if not (starts and o.lstrip("+").startswith("init_from="))]
        known = folders | ({"init_from": cfg.init_from} if cfg.init_from else {})
        parents = {k: v for k, v in known.items() if f"{{{k}}}" in json.dumps(stage)}
        weights = {k: parent_entry(k, v)["weights"] for k, v in parents.items()}
        digest = fingerprint([overrides, weights, data_keys(overrides)])
        if is_done(folder, digest):
            console.print(f"[dim]stage {number + 1} of {len(stages)}: {name} is done[/dim]")
        else:
            console.rule(f"stage {number + 1} of {len(stages)}: {name}")
            run_part(name, folder, overrides)
            write_json(folder / "pipeline.json", {"fingerprint": digest})
        folders[name] = str(folder / "model")
    minutes, seconds = divmod(int(time.monotonic() - began), 60)
    console.print(f"\npipeline {settings['name']} done in {minutes}:{seconds:02d}")
    console.print(f"run         {run}", soft_wrap=True)
    console.print(f"tensorboard --logdir {run}", soft_wrap=True)


def data_keys(overrides: list[str]) -> list[str]:
    """Return the content keys of the data files and reward functions among a stage's overrides."""
    pairs = [override.partition("=") for override in overrides]
    found = [(key, value.strip("'")) for key, _, value in pairs if key in ("data.train", "data.val", "data.ptx")]
    keys = [read_source(value, key.removeprefix("data.")).key for key, value in found if Path(value).exists()]
    codes = [code_key(value.strip("'")) for key, _, value in pairs if key in ("reward_from", "gold_from")]
    return keys + [key for key in codes if key]


GIVEN = {  # what a stage may write as {name} and the user gives as a key
    "root": "data_root: a value is needed, the folder with train.jsonl.gz and test.jsonl.gz",
    "init_from": "init_from: a value is needed, the model this pipeline starts from",
}


def stage_overrides(stage: dict[str, Any], folders: dict[str, str], given: dict[str, str | None]) -> list[str]:
    """Return a stage's overrides with {name} replaced by the model folder of an earlier stage, or by what was given."""
    values = [*stage.get("use", {}).items(), *config.flat(stage.get("set") or {}).items()]
    found = []
    for key, value in values:
        if key:
            if isinstance(value, str):
                for name, folder in (folders | given).items():
                    if f"{{{name}}}" in value and folder is None:
                        raise UserError(GIVEN[name])
                    value = value.replace(f"{{{name}}}", str(folder))
                value = value if key in config.groups() else quoted(value)
            found.append(f"{key}={json.dumps(value) if not isinstance(value, str) else value}")
    # names of models to compare are new keys of an empty dict
    return [f"+{o}" if o.startswith("evaluate.models.") else o for o in found]


def passthrough(overrides: list[str]) -> list[str]:
    """Return the user's overrides that every stage should see."""
    own = ("pipeline", "sweep", "resume", "name", "data_root", "run_folder", "hydra", "run_id")
    return [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0] not in own]


def find_pipeline(run: Path, digest: str, resume: str | None) -> Path:
    """Return this pipeline's folder: with resume=auto the newest one of the same configuration."""
    if resume == "auto":
        for folder in sorted((p for p in run.parent.iterdir() if p.is_dir()), reverse=True):
            found = read_json(folder / "run.json")
            if found and found["fingerprint"] == digest:
                console.print(f"continuing {folder}", soft_wrap=True)
                return folder
    elif (run / "run.json").is_file() and resume == "here":
        if read_json(run / "run.json")["fingerprint"] != digest:
            raise UserError(f"{run} was started with other settings; choose another folder to start anew")
    elif (run / "run.json").is_file():
        raise UserError(f"{run} already holds a pipeline; add resume=auto to continue it")
    write_json(run / "run.json", {"fingerprint": digest})
    return run


def is_done(folder: Path, digest: str) -> bool:
    """Return whether a stage with these overrides and parents has finished in `folder`."""
    found = read_json(folder / "pipeline.json")
    return bool(found) and found["fingerprint"] == digest and (folder / "metrics.json").is_file()


def run_part(name: str, folder: Path, overrides: list[str]) -> None:
    """Run one stage and stop the pipeline when it fails."""
    if (folder / "metrics.json").is_file():  # made by other settings or other parents
        folder.rename(folder.with_name(f"{folder.name}.old-{int(time.time())}"))
    code = processes.run_child(folder, overrides, {"RLHF_PIPELINE_STAGE": name})
    if code:
        raise UserError(
            f"stage {name} failed (exit code {code}); its log is {folder / 'run.log'}. Add resume=auto to the same "
            "command to go on after the stages that are done"
        )
