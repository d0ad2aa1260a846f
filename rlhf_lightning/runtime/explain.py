"""Readable messages for configuration errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from rlhf_lightning.errors import nearest
from rlhf_lightning.runtime.processes import quoted
from rlhf_lightning.runtime.settings import TRAINER_KEYS, flat, groups

RENAMED = {
    "samples": "num_generations",
    "inner_epochs": "ppo_epochs",
    "minibatches": "num_minibatches",
    "workers": "num_workers",
}
"""Old names of keys -> the names they have now."""

SHARDED = " strategy=fsdp2 shards weights, gradients and optimizer states in place of FSDP1 and DeepSpeed."
NOT_SUPPORTED = {("strategy", "fsdp"): SHARDED, ("strategy", "deepspeed"): SHARDED}


def explain(error: Exception, overrides: list[str]) -> str:
    """Return one readable line for a Hydra or OmegaConf error."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        key, _, value = str(error.override).partition("=")
        parts = [quoted(part.strip(" '\"")) for part in value.strip("[]").split(",")]
        text_or_list = f"[{','.join(parts)}]" if value.startswith("[") else quoted(value)
        reason = text.splitlines()[0]
        return f'{error.override}: {reason}; quote texts with special characters, in a shell "{key}={text_or_list}"'
    if match := re.search(r"Could not (?:find|load) '([\w./-]+)'", text):
        group, _, option = match[1].partition("/")
        options = groups().get(group, [])
        if group == "judge" and f"judge:{option}" in " ".join(overrides):
            return (
                f"judge:{option} is no judge: {', '.join(options)}.{nearest(option, options)} A reward of yours in a "
                "module named judge is found when the module has another name"
            )
        if options:
            hint = NOT_SUPPORTED.get((group, option.partition("_")[0])) or nearest(option, options)
            return f"{group}={option} is not one of: {', '.join(options)}.{hint}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1], overrides)
    if match := re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", text):
        return _unknown_key(match[2], overrides)
    lines = [line.strip() for line in text.splitlines() if line.strip() and "object_type" not in line]
    return " ".join(lines[:3]) or type(error).__name__


def _unknown_key(key: str, overrides: list[str]) -> str:
    """Return which keys exist beside an unknown one, by composing without the value overrides."""
    from hydra import compose, initialize_config_module

    options_of_groups = groups()
    selected = [o for o in overrides if o.partition("=")[0] in options_of_groups]
    if folder := _config_dir(overrides):  # the user's own options
        selected.append(f"hydra.searchpath=[{quoted(f'file://{folder}')}]")
    GlobalHydra.instance().clear()
    with initialize_config_module("rlhf_lightning.conf", version_base="1.3"):
        node: Any = compose("rlhf", overrides=selected)
    every = list(flat(OmegaConf.to_container(node)))
    parent, _, name = key.rpartition(".")
    for part in filter(None, parent.split(".")):
        node = OmegaConf.select(node, part, throw_on_missing=False) if isinstance(node, DictConfig) else None
    if isinstance(node, DictConfig) and not node:
        return f"{parent} has no key {name} yet; add it with +{key}=<value>"
    if not isinstance(node, DictConfig):
        return f"there is no key {key}: nothing here has {parent}.*{_where(key, parent)}"
    options = [str(k) for k in node]
    if parent == "trainer" and name in TRAINER_KEYS:
        return f"there is no key {key}: it is decided by {TRAINER_KEYS[name]}"
    if RENAMED.get(name) in options:
        return f"there is no key {key}: it is now {f'{parent}.' if parent else ''}{RENAMED[name]}"
    same_name = [full for full in every if full.endswith(f".{name}")]
    hint = f" Did you mean '{same_name[0]}'?" if same_name else nearest(name, options)
    place = f"{parent} has the keys" if parent else "there are"
    return f"there is no key {key}.{hint} {place}: {', '.join(sorted(options))}"


def _config_dir(arguments: list[str]) -> Path | None:
    """Return the folder of `--config-dir` on the command line."""
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in ("--config-dir", "-cd"):
            following = arguments[place + 1 : place + 2]
            return Path(value if equals else following[0]).resolve() if equals or following else None
    return None


def _where(key: str, parent: str) -> str:
    """Return what brings the missing parent of a key into the configuration."""
    root = parent.partition(".")[0]
    if root in groups()["stage"]:
        return f". It belongs to stage={root}; in a pipeline give +pipeline.stages.{root}.set.{key}=<value>"
    if root == "pipeline":
        return f"; a key the file does not set yet needs a plus: +{key}=<value>"
    options = [option for option in groups().get(root, []) if option != "none"]
    return f"; choose {root}= one of {', '.join(options)}" if options else ""
