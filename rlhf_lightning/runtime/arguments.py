"""The arguments that a configuration gives a class: those of a group's file go to the class that the file names."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection
from typing import Any

import yaml

from rlhf_lightning.runtime.instantiate import SPECIAL, resolve
from rlhf_lightning.runtime.settings import conf_folder

log = logging.getLogger(__name__)
KEPT = {"lr"}  # which every optimizer has, and every stage has its own
FILTERED = ("optimizer", "schedule")
"""Groups to which a stage's file adds arguments, whatever class is chosen."""


def shipped(key: str, option: str | None) -> dict[str, Any]:
    """Return what the shipped file of a group's option says, with the parts it includes; empty for another's file."""
    folder = conf_folder() / key
    if option is None or not (folder / f"{option}.yaml").is_file():
        return {}
    values = yaml.safe_load((folder / f"{option}.yaml").read_text(encoding="utf-8")) or {}
    included: dict[str, Any] = {}
    for part in values.pop("defaults", []):
        if isinstance(part, str) and part.startswith("_") and part != "_self_":
            included |= shipped(key, part)
    return included | values


def own_arguments(settings: dict[str, Any], key: str, option: str | None, given: Collection[str]) -> dict[str, Any]:
    """Return `settings` without arguments that were written for another class, and say which are left out.

    With `optimizer._target_=torch.optim.SGD` the betas of conf/optimizer/adamw.yaml are nobody's wish. What the command
    line gives is always passed, and refused by the class if it does not take it.

    Args:
        settings: the group, with a `_target_` that is allowed.
        key: the group.
        option: the option of the group that was chosen.
        given: the keys that the command line gives.
    """
    file, target = shipped(key, option), settings["_target_"]
    dropped = set()
    if file and file.get("_target_") != target:
        dropped = {name for name, value in settings.items() if name in file and file[name] == value} - KEPT
    if key in FILTERED:
        accepted = inspect.signature(resolve(target, key)).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
            dropped |= settings.keys() - accepted.keys()
    dropped -= {name for name in dropped if name in SPECIAL or f"{key}.{name}" in given}
    if dropped:
        log.warning("%s: %s is not given %s of the configuration's files", key, target, ", ".join(sorted(dropped)))
    return {name: value for name, value in settings.items() if name not in dropped}
