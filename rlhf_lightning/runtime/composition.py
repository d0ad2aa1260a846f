"""Checks of what Hydra composes, before Hydra itself builds anything from it.

Hydra instantiates `hydra.callbacks`, `hydra.launcher` and `hydra.sweeper`, and opens the files of its logging, before
the program gets the configuration. Files (`--config-dir`, pipelines, experiments) may come from others; the command
line is the user's own.
"""

from __future__ import annotations

import os
import re
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.spec import judges
from rlhf_lightning.runtime.instantiate import check_escaped, check_targets, targets, texts
from rlhf_lightning.runtime.secrets import notice_variables
from rlhf_lightning.runtime.settings import flat

BUILT = ("callbacks", "launcher", "sweeper")
"""Keys below `hydra` whose targets Hydra instantiates."""
TARGETS = frozenset(
    {
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
        "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
        "optuna.samplers.CmaEsSampler",
        "optuna.samplers.GridSampler",
        "optuna.samplers.MOTPESampler",
        "optuna.samplers.NSGAIISampler",
        "optuna.samplers.RandomSampler",
        "optuna.samplers.TPESampler",
        "rlhf_lightning.runtime.run_folder.RunFolder",
        "rlhf_lightning.runtime.sweeps.SweepSummary",
    }
)
COMMAND_LINE_ONLY = (
    "allow_targets",
    "hydra.job.env_set",  # LD_PRELOAD of the processes that are started
    "hydra.launcher.additional_parameters",
    "hydra.launcher.setup",  # shell commands
    "hydra.sweeper.custom_search_space",  # a function's name
    "judge.base_url",  # where OPENAI_API_KEY is sent
    "label.base_url",
)
REWARDS = ("reward_from", "gold_from")
ADDRESSES = ("settings", "tracking_uri")
"""Arguments of loggers that say where credentials are sent, or which program is run."""
TRACKING = "${oc.env:MLFLOW_TRACKING_URI,sqlite:///${paths.run}/mlflow.db}"
"""What conf/logger/mlflow.yaml says: the user's own server, or a file in the run folder."""
LOGGING_CLASSES = frozenset(
    {
        "colorlog.ColoredFormatter",
        "logging.FileHandler",
        "logging.Formatter",
        "logging.NullHandler",
        "logging.StreamHandler",
        "logging.handlers.RotatingFileHandler",
        "logging.handlers.TimedRotatingFileHandler",
    }
)
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
RUN_FOLDER = "/run_folder"
"""Stands for the run folder, which Hydra decides after composing."""


def guard() -> None:
    """Check every configuration that Hydra composes from now on in this process."""
    compose = ConfigLoaderImpl.load_configuration
    if compose.__module__ == __name__:
        return

    def load_configuration(
        self: ConfigLoaderImpl, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any
    ) -> DictConfig:
        try:
            check_search_path(self, config_name)
            overrides = [*overrides, *judge_of_command(overrides)]
            cfg = compose(self, config_name, overrides, *args, **kwargs)
            if chosen := judge_of(cfg):  # by a file
                overrides = [*overrides, chosen]
                cfg = compose(self, config_name, overrides, *args, **kwargs)
        except (HydraException, OmegaConfBaseException, UserError):
            raise
        except Exception as error:  # YAML that is none, and what Hydra and OmegaConf do not foresee
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"the configuration cannot be composed: {reason}") from error
        notice_variables(cfg)
        check_composed(cfg, overrides)
        return cfg

    ConfigLoaderImpl.load_configuration = load_configuration  # type: ignore[method-assign]


def judge_of_command(overrides: list[str]) -> list[str]:
    """Return the choice of the judge that a reward on the command line names, unless it is chosen there."""
    given = {o.key_or_group: o for o in OverridesParser.create().parse_overrides(overrides)}
    if "judge" in given and given["judge"].package is None:
        return []
    rewards = [given[key].value() for key in REWARDS if key in given and not given[key].is_sweep_override()]
    names = {name for value in rewards for name in judges(value)}
    return [f"judge={names.pop()}"] if len(names) == 1 else []


def judge_of(cfg: DictConfig) -> str | None:
    """Return the choice of the judge that a reward names and that is not chosen yet.

    Raises:
        UserError: several judges, or another one than was chosen.
    """
    container: Any = OmegaConf.to_container(cfg, resolve=False)
    names = sorted({name for key in REWARDS for name in judges(container.get(key), key)})
    chosen = container["hydra"]["runtime"]["choices"].get("judge")
    if not names or names == [chosen]:
        return None
    if len(names) > 1:
        raise UserError(
            f"reward_from and gold_from name several judges, {', '.join(names)}, and their settings are all below "
            "judge; judge=many lets several vote"
        )
    if chosen not in (None, "null"):
        raise UserError(f"reward_from=judge:{names[0]} is another judge than judge={chosen}")
    return f"judge={names[0]}"


def check_search_path(loader: ConfigLoaderImpl, config_name: str | None) -> None:
    """Raise a UserError when a primary configuration of the user's names a package to search, which is imported."""
    primary = loader.repository.load_config(config_name) if config_name else None
    places = OmegaConf.select(primary.config, "hydra.searchpath") if primary else None  # type: ignore[arg-type]
    for place in places or ():
        if not str(place).startswith("file://"):
            raise UserError(f"hydra.searchpath={place} in {primary.path}: only file:// folders")  # type: ignore[union-attr]


def check_composed(cfg: DictConfig, overrides: list[str]) -> None:
    """Raise a UserError for what a file may not set, and for targets of Hydra's own that are not allowed.

    Args:
        overrides: those of the command line.
    """
    hydra = cfg.hydra
    given = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(overrides)}
    recorded: Any = OmegaConf.to_container(hydra.overrides, resolve=False)
    if sorted(recorded["hydra"] + recorded["task"]) != sorted(overrides):
        raise UserError("hydra.overrides is what the command line said; no file can set it")
    check_command_line_only(cfg, given)
    allowed = TARGETS | set(map(str, cfg.get("allow_targets") or ()))
    for name in BUILT:
        key, node = f"hydra.{name}", hydra.get(name)
        if not OmegaConf.is_config(node):
            continue
        settings, written = resolved(node, key), OmegaConf.to_container(node, resolve=False)
        check_targets(settings, key, allowed)
        if list(targets(settings, key)) != list(targets(written, key)):
            raise UserError(f"{key}: a _target_ is written out, not interpolated")
        check_escaped(settings, key)
    check_swept(OmegaConf.to_container(hydra, resolve=False))
    folder = hydra.output_subdir
    if folder is not None and (folder != os.path.basename(folder) or folder in ("", ".", "..")):
        raise UserError(f"hydra.output_subdir={folder!r} is not the name of a folder in the run folder, such as .hydra")
    for name in ("hydra_logging", "job_logging"):
        check_logging(hydra, name)
    with read_write(hydra), open_dict(hydra):
        for name in hydra.job.env_copy:  # Hydra writes env_set to .hydra/hydra.yaml
            hydra.job.env_set[name] = f"${{oc.env:{name}}}"


def check_swept(hydra: Any) -> None:
    """Raise a UserError for swept keys, which become the command line of trials, that no file may give."""
    for name, value in ((hydra["sweeper"] or {}).get("params") or {}).items():
        if re.split(r"[.@/]", str(name).lstrip("+~"))[0] in ("hydra", "allow_targets"):
            raise UserError(f"hydra.sweeper.params: {name} cannot be swept; give it on the command line")
        if "oc.env" in str(value):
            raise UserError(f"hydra.sweeper.params.{name} would write a variable's value to the files of the trials")


def check_command_line_only(cfg: DictConfig, given: dict[str, Any]) -> None:
    """Raise a UserError for a value under a key of `COMMAND_LINE_ONLY` that the command line did not give."""
    trusted: dict[str, Any] = {}
    for key, value in given.items():
        trusted |= flat(value, key)
    copied = [f"hydra.job.env_set.{name}" for name in cfg.hydra.job.env_copy]
    members = (cfg.get("judge") and cfg.judge.get("members")) or {}
    for key in (*COMMAND_LINE_ONLY, *(f"judge.members.{name}.base_url" for name in members)):
        node = OmegaConf.select(cfg, key, throw_on_missing=False)
        node = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
        for name, value in flat(node, key).items():
            if value and name not in copied and str(trusted.get(name)) != str(value):
                raise UserError(f"{key} is taken from the command line only, not from a file: {name}={value}")
    loggers = cfg.get("logger")
    if not OmegaConf.is_config(loggers) or isinstance(given.get("logger"), dict | list):
        return
    for name, text in texts(OmegaConf.to_container(loggers, resolve=False), "logger"):
        if set(ADDRESSES) & set(name.split(".")) and text not in (str(trusted.get(name)), TRACKING):
            raise UserError(
                f"{name} is taken from the command line or the logger's environment, not from a file: {text}"
            )


def check_logging(hydra: DictConfig, name: str) -> None:
    """Raise a UserError for logging that builds another class than the usual ones or writes outside the run folder."""
    with read_write(hydra), open_dict(hydra):
        before, hydra.runtime.output_dir = hydra.runtime._get_node("output_dir"), RUN_FOLDER
        try:
            settings = resolved(hydra[name], f"hydra.{name}")
        finally:
            hydra.runtime.output_dir = before
    for where, text in texts(settings, f"hydra.{name}"):
        key = where.rpartition(".")[2]
        if key in ("class", "()") and text not in LOGGING_CLASSES:
            raise UserError(f"{where}={text} is not allowed: one of {', '.join(sorted(LOGGING_CLASSES))}")
        if "://" in text and (key == "stream" or text.startswith(("ext://", "cfg://"))) and text not in STREAMS:
            raise UserError(f"{where}={text} is not allowed: {' or '.join(STREAMS)}")
        if key == "filename" and not os.path.normpath(text).startswith(f"{RUN_FOLDER}/"):
            raise UserError(f"{where}={text}: logs are written below the run folder, ${{hydra.runtime.output_dir}}/...")
    check_escaped(settings, f"hydra.{name}")


def resolved(node: Any, key: str) -> Any:
    """Return `node` as dicts and lists with everything resolved."""
    try:
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except OmegaConfBaseException as error:
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from error
