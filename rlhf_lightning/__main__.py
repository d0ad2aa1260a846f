"""The `rlhf` command: one Hydra app whose arguments are also what relaunched ranks receive."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlhf_lightning.distributed import is_lost_peer
from rlhf_lightning.errors import UserError
from rlhf_lightning.files import write_failure
from rlhf_lightning.runtime.composition import guard
from rlhf_lightning.runtime.explain import explain
from rlhf_lightning.runtime.launch import arguments_of_rank
from rlhf_lightning.runtime.processes import end_with_parent, quoted
from rlhf_lightning.runtime.run_folder import remove_start
from rlhf_lightning.runtime.secrets import redact
from rlhf_lightning.runtime.settings import DATA_SPLITS, check_groups, check_types, groups, require, task_overrides
from rlhf_lightning.stages import STAGES

SELECTORS = ("stage", "pipeline", "experiment", "sweep")
UNSET = {*SELECTORS, "debug"}
"""Groups that are null where nothing is chosen."""
QUESTIONS = {"--hydra-help", "--info", "-i"}
RERUN = "--experimental-rerun"


@hydra.main(version_base="1.3", config_path="pkg://rlhf_lightning.conf", config_name="rlhf")
def app(cfg: DictConfig) -> float | list[float] | None:
    """Run the stage or the pipeline that was composed."""
    try:
        check_groups(cfg)
        check_types(cfg, task_overrides())
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            from rlhf_lightning.runtime.sweeps import run_trial

            return run_trial(cfg)
        if cfg.plan and cfg.pipeline:
            raise UserError("plan is for one stage: rlhf stage=<stage> ... plan=true")
        if cfg.pipeline:
            from rlhf_lightning.runtime.pipeline import run_pipeline

            splits = DATA_SPLITS | {key: split for stage in STAGES.values() for key, split in stage.sources.items()}
            maps = [key for stage in STAGES.values() for key in (*stage.models, *stage.sources)]
            return run_pipeline(cfg, maps, splits)
        if cfg.stage not in STAGES:
            raise UserError(f"choose what to run with stage= one of {', '.join(STAGES)}")
        if cfg.plan:
            from rlhf_lightning.stages.plan import run_plan

            if not (place := Path(HydraConfig.get().runtime.output_dir) / "run.json").exists():
                remove_start(place.parent)
            return run_plan(cfg)
        require(cfg)
        return run_stage(cfg)
    except UserError as error:  # here, because Hydra would print a line of its own first
        logging.getLogger("rlhf_lightning").info("%s", redact(str(error)))
        fail(str(error), 2)
    except OmegaConfBaseException as error:
        fail(explain(error, sys.argv[1:]), 2)


def run_stage(cfg: DictConfig) -> float | None:
    """Import what stages need, which takes seconds, and run the stage."""
    gc.disable()  # imports create a million objects that stay; collecting them repeatedly takes a second
    from rlhf_lightning.stages import run

    gc.freeze()
    gc.enable()
    return run.run_stage(cfg)


def normalize(arguments: list[str]) -> list[str]:
    """Return `arguments` as Hydra reads them; idempotent.

    model=<folder or hub name> is model=hub model.name=<...>, a key of the empty map data.columns is added to it, and
    <group>=null leaves the group out. A value that the grammar of overrides does not read is quoted.
    """
    options, several = groups().get("model", []), is_sweep(arguments)
    normalized = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        path = "," not in value or (not several and Path(value).exists())
        if key == "model" and equals and value not in options and path:
            name = value if value.startswith(("'", '"')) else quoted(value)
            normalized += ["model=hub", f"model.name={name}"]
        elif value == "null" and key in groups():
            normalized += [] if key in UNSET else [f"~{key}"]
        elif key.startswith("data.columns."):
            normalized.append(readable(f"++{argument}", several))
        elif equals and not key.startswith("-") and key not in groups():
            normalized.append(readable(argument, several))
        else:
            normalized.append(argument)
    return normalized


def is_sweep(arguments: list[str]) -> bool:
    """Return whether the command line asks for a sweep, whose commas separate values."""
    modes = {"-m", "--multirun", "hydra.mode=MULTIRUN"}
    return bool(modes & set(arguments)) or any(argument.startswith("sweep=") for argument in arguments)


def readable(override: str, several: bool) -> str:
    """Return an override with its value quoted where Hydra's grammar does not read it, such as a path with = or ü.

    Args:
        several: the value may be several, separated by commas.
    """
    key, _, value = override.partition("=")

    def fits(text: str) -> bool:
        try:
            parsed = OverridesParser.create().parse_override(f"{key}={text}")
        except HydraException:
            return False
        return several or not (parsed.is_sweep_override() and Path(text).exists())  # a file's name with a comma

    if fits(value) or value.startswith(("'", '"')) or (value.startswith(("[", "{")) and not Path(value).exists()):
        return override
    parts = value.split(",") if several else [value]
    return f"{key}={','.join(part if fits(part) else quoted(part) for part in parts)}"


def sweep_id(arguments: list[str]) -> str:
    """Return the name of a sweep's folder: the same command has the same folder and continues there."""
    beside = ("resume=", "hydra.launcher.", "hydra.verbose", "hydra.sweep.", "-", "on_failed_trial=")
    words = [a for a in arguments if not a.startswith(beside)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]


def usage() -> str:
    """Return the usage message."""
    options = groups()
    return (
        "usage: rlhf stage=<stage> [key=value] ...   or   rlhf pipeline=<pipeline> [key=value] ...\n"
        f"  stages: {', '.join(STAGES)}\n"
        f"  pipelines: {', '.join(options.get('pipeline', []))}\n"
        f"  experiments: {', '.join(options.get('experiment', []))}\n"
        "  rlhf --help shows every stage and group; rlhf stage=sft --cfg job shows every key"
    )


def help_text() -> str:
    """Return the stages and the options of every group of the configuration."""
    stages = "\n".join(f"  stage={stage.name:11}{stage.summary}" for stage in STAGES.values())
    options = "\n".join(f"  {group}: {', '.join(names)}" for group, names in groups().items() if group != "stage")
    return (
        "rlhf: SFT, reward models, PPO and DPO with Lightning and Hydra\n\n"
        "  rlhf stage=<stage> [group=option] [key=value] ...     run one stage\n"
        "  rlhf pipeline=<pipeline> [key=value] ...              run a list of stages\n"
        "  rlhf -m stage=dpo dpo.beta=0.03,0.1 ...               a sweep\n"
        "  rlhf stage=dpo --cfg job --resolve                    show the configuration, run nothing\n\n"
        f"Stages:\n\n{stages}\n\n"
        f"Groups (group=option):\n\n{options}\n\n"
        "Any key of --cfg job can be given as key=value. Guide: docs/configuration.md"
    )


def main() -> None:
    """Entry point of the console script: 0 done, 2 a mistake of the user's, 1 a bug, 130 and 143 when interrupted."""
    sys.argv[1:] = normalize(sys.argv[1:])
    arguments = sys.argv[1:]
    if "--version" in arguments:
        from rlhf_lightning import __version__

        print(f"rlhf_lightning {__version__}")
        return
    if {"--help", "-h"} & set(arguments):
        print(help_text())
        return
    keys = {argument.partition("=")[0] for argument in arguments}
    if any(len(key) > 2 and RERUN.startswith(key) and key.startswith("--e") for key in keys):
        fail(f"{RERUN} unpickles a file, which can run code; give the settings or --config-dir instead", 2)
    if not keys & {*SELECTORS, *QUESTIONS, "--cfg", "-c"}:
        print(usage(), file=sys.stderr)
        sys.exit(2)
    try:
        sys.argv += arguments_of_rank(arguments)
    except UserError as error:
        fail(str(error), 2)
    os.environ.setdefault("RLHF_SWEEP_ID", sweep_id(arguments))
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors reach us instead of being printed by Hydra
    guard()
    end_with_parent()
    try:
        try:
            app()
        except (HydraException, OmegaConfBaseException) as error:
            fail(explain(error, arguments), 2)
    except UserError as error:
        fail(str(error), 2)
    except KeyboardInterrupt as stop:
        code = stop.args[0] if stop.args else 130
        fail("interrupted; add resume=auto to the same command to continue", code)
    except Exception as error:
        if is_lost_peer(error):
            logging.getLogger("rlhf_lightning").info("another rank exited, or the network failed", exc_info=error)
            first = str(error).strip().splitlines()[0]
            fail(f"another rank exited, or the network failed: {first[:200]}; see the log", 1)
        reason = write_failure(error)
        if reason is None:
            raise
        place = getattr(error, "filename", None)
        fail(f"cannot read or write{f' {place}' if place else ''}: {reason}; what was saved before is intact", 2)


def fail(message: str, code: int) -> NoReturn:
    """Print one line on standard error and leave; Hydra's own line of overrides is not needed."""
    print(f"rlhf: {redact(message)}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
