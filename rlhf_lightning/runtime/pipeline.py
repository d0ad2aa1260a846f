"""An ordered list of stages, each in a process of its own: one that is done is skipped, the first failure ends it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from rlhf_lightning.data.sources import is_local, read_source
from rlhf_lightning.errors import UserError
from rlhf_lightning.files import file_digest, fingerprint, read_json, write_json
from rlhf_lightning.judges.constitution import constitution_digests
from rlhf_lightning.models.folder import MANIFEST, parent_entry, weights_key
from rlhf_lightning.rewards.spec import digests
from rlhf_lightning.runtime.instantiate import check_escaped
from rlhf_lightning.runtime.processes import quoted, run_child
from rlhf_lightning.runtime.run_folder import claim, occupy, remove_start
from rlhf_lightning.runtime.secrets import redacted
from rlhf_lightning.runtime.settings import DATA_SPLITS, flat, groups, select, task_overrides, to_container

console = Console()
REWARDS = ("reward_from", "gold_from")
MAPS = ("data.columns", "data.world.labeller.group", "reward_ensemble", "reward_groups", "simulate.groups", *REWARDS)
"""Keys whose value may be a map, which a stage fills in member by member."""
JUDGES_MODEL = re.compile(r"judge\.(members\.\w+\.)?model")
KEY = re.compile(r"[+~]*(\w+)[\w./@+-]*")
GIVEN = {  # what a stage may write as {name} and the user gives as a key
    "root": "data_root: a value is needed, the folder with train.jsonl.gz and test.jsonl.gz",
    "init_from": "init_from: a value is needed, the model this pipeline starts from",
}


def run_pipeline(cfg: DictConfig, maps: Collection[str] = (), splits: Mapping[str, str] = DATA_SPLITS) -> None:
    """Run the stages of `cfg.pipeline` in order.

    Args:
        maps: keys of the configuration that are empty and to be filled, such as `evaluate.models`.
        splits: keys of the configuration that name data -> the split that is read.

    Raises:
        UserError: naming the stage that failed and how to go on, or the stage that is a pipeline again.
    """
    everything, shown, maps = to_container(cfg), redacted(cfg), [*maps, *MAPS]
    settings = everything["pipeline"]
    check_escaped(settings, "pipeline")  # as a command line it would be resolved once more
    if inside := os.environ.get("RLHF_PIPELINE_STAGE"):  # an experiment passed on to it may choose a pipeline
        raise UserError(f"stage {inside} of a pipeline became pipeline={settings['name']}")
    given = passthrough(task_overrides())
    run = Path(HydraConfig.get().runtime.output_dir)
    run = find_pipeline(run, fingerprint([settings, given]), cfg.resume)
    folders: dict[str, str | None] = {"root": cfg.data_root, "init_from": cfg.init_from}
    written = {"root": shown["data_root"], "init_from": shown["init_from"]}
    began, stages, debug = time.monotonic(), settings["stages"], debug_values()
    for number, (name, stage) in enumerate(stages.items()):
        folder = run / f"{number}_{name}"
        values = stage_values(stage, folders)
        mine = of_stage(given, values)
        overrides = [as_override(key, value, maps) for key, value in (values | debug).items()] + mine
        arguments = stage_values(shown["pipeline"]["stages"][name], written) | debug
        digest = fingerprint(
            [
                overrides,
                parent_weights(stage, folders),
                content_digests(values | debug | parsed(mine, everything), splits),
            ]
        )
        if is_done(folder, digest):
            console.print(f"[dim]stage {number + 1} of {len(stages)}: {name} is done[/dim]")
        else:
            console.rule(f"stage {number + 1} of {len(stages)}: {name}")
            run_part(name, folder, [as_override(key, value, maps) for key, value in arguments.items()] + mine, digest)
        folders[name] = written[name] = str(product(folder))
    minutes, seconds = divmod(int(time.monotonic() - began), 60)
    console.print(f"\npipeline {settings['name']} done in {minutes}:{seconds:02d}")
    console.print(f"run         {run}", soft_wrap=True)
    console.print(f"tensorboard --logdir {run}", soft_wrap=True)
    from rlhf_lightning.evaluation.report.cards import write_evaluations
    from rlhf_lightning.evaluation.report.page import write_report  # it imports what draws the figures

    write_evaluations(run)
    console.print(f"report      {write_report(run)}", soft_wrap=True)


def stage_values(stage: dict[str, Any], folders: dict[str, str | None]) -> dict[str, Any]:
    """Return key -> value of a stage, with {name} replaced by what an earlier stage made or by what was given.

    Raises:
        UserError: a key that only the command line may give, or that is none.
    """
    values = (stage.get("use") or {}) | flat(stage.get("set") or {})
    for key in filter(None, values):
        root = KEY.fullmatch(str(key))
        if root is None:
            raise UserError(f"pipeline: {key!r} is not a key of the configuration")
        if root[1] in ("hydra", "allow_targets") or str(key).endswith(".base_url"):
            raise UserError(f"pipeline: {key} is taken from the command line only, not from a file")
    return {key: filled(value, folders) for key, value in values.items() if key}


def of_stage(given: list[str], values: Mapping[str, Any]) -> list[str]:
    """Return the user's overrides for a stage that sets `values`.

    Where it says itself what it starts from or compares, that is not what the pipeline starts from.
    """
    if not any(key == "init_from" or key.partition(".")[2].startswith("models.") for key in values):
        return given
    return [override for override in given if not override.lstrip("+").startswith("init_from=")]


def filled(value: Any, folders: dict[str, str | None]) -> Any:
    """Return `value` with every {name} in its texts replaced.

    Raises:
        UserError: a name that the user has to give and did not.
    """
    if isinstance(value, list):
        return [filled(member, folders) for member in value]
    if not isinstance(value, str):
        return value
    for name, folder in folders.items():
        if f"{{{name}}}" in value and folder is None:
            raise UserError(GIVEN[name])
        value = value.replace(f"{{{name}}}", str(folder))
    return value


def as_override(key: str, value: Any, maps: Collection[str] = ()) -> str:
    """Return key and value in Hydra's override grammar; a new key of one of `maps` is added."""
    if any(key.startswith(f"{name}.") for name in maps):
        key = f"+{key}"
    if isinstance(value, list):
        return f"{key}=[{','.join(quoted(v) if isinstance(v, str) else json.dumps(v) for v in value)}]"
    if isinstance(value, str):
        return f"{key}={value if key in groups() else quoted(value)}"
    return f"{key}={json.dumps(value)}"


def parsed(overrides: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Return key -> value of the user's overrides, resolved where the pipeline itself has the key in `settings`."""
    values = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(overrides)}
    return {key: value if select(settings, key) is None else select(settings, key) for key, value in values.items()}


def product(folder: Path) -> Path:
    """Return what the stage in a run folder made: its model folder, or the file that its record names."""
    output = (read_json(folder / "run.json") or {}).get("output")
    made = folder / "model" if not isinstance(output, str) else folder / output
    return made.parent if made.name == MANIFEST else made


def parent_weights(stage: dict[str, Any], folders: dict[str, str | None]) -> dict[str, str | None]:
    """Return the content of every model folder or file that a stage names as {name}."""
    text = json.dumps(stage)
    named = {name: folder for name, folder in folders.items() if folder and f"{{{name}}}" in text and name != "root"}
    return {
        name: file_digest(Path(made)) if Path(made).is_file() else parent_entry(name, made)["weights"]
        for name, made in named.items()
    }


def content_digests(values: dict[str, Any], splits: Mapping[str, str] = DATA_SPLITS) -> list[Any]:
    """Return the digests of the data files, rewards, models of judges and constitutions among a stage's values."""
    places = {key: key if key in splits else key.rpartition(".")[0] for key in values}  # of a map of sources
    given = [(key, part) for key, place in places.items() if place in splits for part in parts_of(values[key])]
    keys = [
        read_source(part, splits[places[key]], name=key.removeprefix("data.")).key
        for key, part in given
        if is_local(part)
    ]
    rewards = [value for key, value in values.items() if value and key.partition(".")[0] in REWARDS]
    judges = [str(value) for key, value in values.items() if JUDGES_MODEL.fullmatch(key) and Path(str(value)).is_dir()]
    models = [weights_key(model) for model in judges]
    return keys + [digests(value) for value in rewards] + models + constitution_digests(values)


def parts_of(value: Any) -> list[Any]:
    """Return the sources that a key of data names."""
    return list(value) if isinstance(value, list) else [value]


def debug_values() -> dict[str, Any]:
    """Return what the choice of `debug` sets: it comes before what a pipeline sets for a stage."""
    choice = HydraConfig.get().runtime.choices.get("debug")
    if not choice:
        return {}
    with_debug, without = (
        flat(OmegaConf.to_container(compose("rlhf", overrides=overrides))) for overrides in ([f"debug={choice}"], [])
    )
    return {key: value for key, value in with_debug.items() if value != without.get(key)}


def passthrough(overrides: list[str]) -> list[str]:
    """Return the user's overrides that every stage should see."""
    own = ("pipeline", "sweep", "resume", "name", "data_root", "run_folder", "hydra", "run_id")
    return [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0] not in own]


def find_pipeline(run: Path, digest: str, resume: str | None) -> Path:
    """Return this pipeline's folder: with resume=auto the newest one of the same configuration."""
    if resume == "auto":
        for folder in sorted((p for p in run.parent.iterdir() if p.is_dir()), reverse=True):
            record = read_json(folder / "run.json")
            if isinstance(record, dict) and record.get("fingerprint") == digest:
                if folder != run:
                    remove_start(run)
                occupy(folder)
                console.print(f"continuing {folder}", soft_wrap=True)
                return folder
    elif (run / "run.json").is_file() and resume == "here":
        if (read_json(run / "run.json") or {}).get("fingerprint") != digest:
            raise UserError(f"{run} was started with other settings; choose another folder for a new run")
        occupy(run)
        return run
    claim(run, {"fingerprint": digest})
    occupy(run)
    return run


def is_done(folder: Path, digest: str) -> bool:
    """Return whether a stage with these overrides, parents, data and rewards has finished in `folder`."""
    record = read_json(folder / "pipeline.json")
    return bool(record) and record.get("fingerprint") == digest and (folder / "metrics.json").is_file()


def run_part(name: str, folder: Path, overrides: list[str], digest: str) -> None:
    """Run one stage, from where it was stopped, and stop the pipeline when it fails."""
    record = read_json(folder / "pipeline.json")
    if folder.is_dir() and (not record or record["fingerprint"] != digest):  # made by other settings or other parents
        folder.rename(folder.with_name(f"{folder.name}.old-{int(time.time())}"))
    write_json(folder / "pipeline.json", {"fingerprint": digest})  # first, for a stage that is killed
    code = run_child(folder, overrides, {"RLHF_PIPELINE_STAGE": name}, fork=True)
    if code:
        raise UserError(
            f"stage {name} failed (exit code {code}); its log is {folder / 'run.log'}. Add resume=auto to the same "
            "command to continue after the stages that are done"
        )
