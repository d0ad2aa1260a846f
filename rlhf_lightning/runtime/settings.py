"""The composed configuration: as dicts and lists, its identity and groups, and checks of its values."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_lightning.errors import UserError

DATA_SPLITS = {"data.train": "train", "data.val": "val", "data.ptx": "train"}
"""Keys of the configuration that name data -> the split that is read."""
RUN_ONLY = (
    "paths", "resume", "run_id", "run_folder", "name", "callbacks", "logger", "allow_targets", "objectives",
    "on_failed_trial", "plan", "card", "hardware",
)  # fmt: skip
DECIDING = {
    "BackboneFinetuning", "BatchSizeFinder", "EMAWeightAveraging", "EarlyStopping", "LearningRateFinder",
    "ModelPruning", "Smoothed", "StochasticWeightAveraging", "Timer", "WeightAveraging",
}  # fmt: skip
"""Lightning's callbacks that decide a run's result; the others look at it."""
OPTIONAL = ("adapter", "callbacks", "hardware", "judge", "logger", "schedule")
"""Groups that may be null: `logger=null` and `~logger` are the same."""
HOW_TO_ASK = ("batch_tokens", "cache", "concurrency", "price_per_million", "retries", "timeout")
"""Settings of a judge that decide how it is asked, not what it says."""
HOW_TO_SAMPLE = ("base_url", "concurrency", "folder", "retries", "sleep", "timeout", "tolerance")
"""Settings of a sampler that decide how a server is asked, not what it says."""
BUILT = ("optimizer", "sampler", "trainer")
TRAINER_KEYS = {
    "callbacks": "callbacks.<name>._target_=<class>",
    "logger": "logger=",
    "plugins": "nothing: checkpoints and ranks have plugins of this package",
    "strategy": "strategy=single, ddp, fsdp2 or tensor_parallel",
}
"""Arguments of the Trainer that have a group of their own -> what to give instead of `trainer.<name>`."""


def to_container(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration as dicts and lists with everything resolved, a group without an option as None."""
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    return dict.fromkeys(OPTIONAL) | {str(key): value for key, value in values.items()}


def check_groups(cfg: DictConfig) -> None:
    """Raise a UserError for a group without an option that every run needs, and for keys that no Trainer gets."""
    for group in ("data", "model", "optimizer", "paths", "sampler", "strategy", "trainer"):
        node = cfg.get(group)  # what a stage adds to a group is left when the group is null
        if node is None or (group in BUILT and "_target_" not in node):
            raise UserError(f"{group} is null: choose {group}= one of {', '.join(groups()[group])}")
    if (probe := cfg.get("probe")) and "models" not in probe:  # which the stage's own file has
        raise UserError(
            "probe= is for stage=probe; during training: callbacks=probes callbacks.probes.probes=[<probe>]"
        )
    if cfg.get("hardware") and not cfg.plan:
        raise UserError("hardware= is what plan=true plans for: add plan=true")
    for name, instead in TRAINER_KEYS.items():
        if name in cfg.trainer:
            raise UserError(f"trainer.{name} is decided by {instead}")


def identity(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what decides a run's result: the settings without where it writes and what it is called."""
    deciding = {key: value for key, value in settings.items() if key not in RUN_ONLY}
    kinds = DECIDING | ({"ModelCheckpoint"} if settings.get("export") == "best" else set())
    for name, node in (settings.get("callbacks") or {}).items():
        if node and str(node.get("_target_")).rpartition(".")[2] in kinds:
            deciding[f"callbacks.{name}"] = node
    data = {key: value for key, value in settings["data"].items() if key not in ("cache_dir", "num_workers")}
    sampler = {key: value for key, value in settings["sampler"].items() if key not in HOW_TO_SAMPLE}
    judge = deciding.pop("judge", None)
    return deciding | {"data": data, "sampler": sampler} | ({"judge": deciding_judge(judge)} if judge else {})


def deciding_judge(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a judge that decide what it says; its models are parents, by their content."""
    result = {key: value for key, value in settings.items() if key not in HOW_TO_ASK}
    if members := result.get("members"):
        result["members"] = {name: deciding_judge(member) for name, member in members.items()}
    return result


def select(settings: dict[str, Any], key: str) -> Any:
    """Return the value at the dotted `key`, None where there is none."""
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def named(key: str, value: Any) -> list[tuple[str, Any]]:
    """Return (key, value) of a setting, of a map of names to values one for each."""
    return [(f"{key}.{name}", member) for name, member in value.items()] if isinstance(value, dict) else [(key, value)]


NAME = re.compile(r"\w[\w.+=@ -]{0,99}")


def check_names(key: str, given: Any) -> None:
    """Raise a UserError where a setting is no map, or names something by what files and tags cannot be called."""
    if not isinstance(given, dict):
        raise UserError(f"{key}={given} is no map: give +{key}.<name>=...")
    wrong = [str(name) for name in given if not NAME.fullmatch(str(name))]
    if wrong:
        raise UserError(
            f"{key}: {wrong[0]!r:.60} cannot be a name: that is up to 100 letters, digits, spaces and . _ + = @ -, "
            "and begins with a letter or digit"
        )


LOWER = ("loss", "kl", "calibration_error", "brier", "disagreement")
"""Parts of the names of metrics of which less is better."""


def lower_is_better(metric: str) -> bool:
    """Return whether a smaller value of `metric` is the better one."""
    return any(word in metric.rpartition("/")[2] or word in metric.split("/") for word in LOWER)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as {"a.b": value}."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    values: dict[str, Any] = {}
    for key, value in node.items():
        values |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return values


def task_overrides() -> list[str]:
    """Return the command line's overrides as they were written; reading the list one by one would resolve them."""
    from hydra.core.hydra_config import HydraConfig

    return list(OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))  # type: ignore[arg-type]


def require(cfg: DictConfig) -> None:
    """Raise a UserError that names every mandatory key without a value."""
    missing = sorted(k for k in OmegaConf.missing_keys(cfg) if not k.startswith("hydra"))
    if missing:
        raise UserError(f"{', '.join(missing)}: a value is needed, for example {missing[0]}=<value>")


def check_types(cfg: DictConfig, overrides: list[str]) -> None:
    """Raise a UserError when the command line puts a text where the configuration has a number or a truth value."""
    from hydra import compose

    options = groups()
    keys = {o.partition("=")[0] for o in overrides if "=" in o} - {*options, "trainer.devices"}  # also "auto" and lists
    values = {
        k: OmegaConf.select(cfg, k, throw_on_missing=False) for k in keys if not k.startswith(("+", "~", "hydra."))
    }
    texts = {key: value for key, value in values.items() if isinstance(value, str)}
    if not texts:
        return
    defaults = compose("rlhf", overrides=[o for o in overrides if o.partition("=")[0] in options])
    for key, value in sorted(texts.items()):
        default = OmegaConf.select(defaults, key, throw_on_missing=False)
        if isinstance(default, int | float):
            kind = "true or false" if isinstance(default, bool) else "a number"
            raise UserError(f"{key}={value!r} is not {kind}; its default is {default}")


def conf_folder() -> Path:
    """Return the folder of the shipped configuration tree."""
    import importlib.resources

    return Path(str(importlib.resources.files("rlhf_lightning.conf")))


@cache
def groups() -> dict[str, list[str]]:
    """Return the options of every configuration group."""
    options: dict[str, list[str]] = {}
    root = conf_folder()
    for file in sorted(root.rglob("*.yaml")):
        parent, *rest = file.relative_to(root).with_suffix("").parts
        if rest and parent != "hydra" and not rest[-1].startswith("_"):  # included by others
            options.setdefault(parent, []).append("/".join(rest))
    return options
