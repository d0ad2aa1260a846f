"""Values of environment variables stay out of what is written: `${oc.env:NAME}` stands in their place."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

OPEN, CLOSE = "\ue010", "\ue011"
"""Around a resolver's call while a configuration is resolved; they become "${" and "}"."""
VARIABLE = re.compile(r"\$\{oc\.env:\s*([\w.]+)")
OURS = {"HOME", "RLHF_CACHE", "RLHF_RUN_ID", "RLHF_SWEEP_ID"}
"""Variables that the shipped configuration reads: places and names, in every path."""
SHORTEST = 4  # characters: a shorter value would be found in other words
_names: set[str] = set()


def redacted(cfg: DictConfig) -> Any:
    """Return the configuration as dicts and lists, resolved but for what comes from environment variables."""
    with _marked_variables():
        try:
            settings = OmegaConf.to_container(cfg, resolve=True)
        except OmegaConfBaseException:  # a key, a path of another resolver made of a variable
            settings = OmegaConf.to_container(cfg, resolve=False)
    return _unmarked(settings)


def notice_variables(cfg: DictConfig) -> None:
    """Remember which environment variables the interpolations of a configuration read, for :func:`redact`."""
    _names.update(set(VARIABLE.findall(OmegaConf.to_yaml(cfg))) - OURS)


def redact(text: str) -> str:
    """Return `text` with the values of the environment variables that a configuration read replaced."""
    for name in sorted(_names, key=lambda name: -len(os.environ.get(name, ""))):
        value = os.environ.get(name, "")
        if len(value) >= SHORTEST:
            text = text.replace(value, f"${{oc.env:{name}}}")
    return text


@contextmanager
def _marked_variables() -> Iterator[None]:
    def env(key: str, *default: Any) -> Any:
        return f"{OPEN}oc.env:{key}{CLOSE}" if key in os.environ else oc.env(key, *default)

    def decode(expr: Any, _parent_: Any, _node_: Any) -> Any:
        return f"{OPEN}oc.decode:{expr}{CLOSE}" if OPEN in str(expr) else oc.decode(expr, _parent_, _node_)

    def select(key: str, *default: Any, _parent_: Any) -> Any:
        return f"{OPEN}oc.select:{key}{CLOSE}" if OPEN in key else oc.select(key, *default, _parent_=_parent_)

    try:
        for resolver in (env, decode, select):
            OmegaConf.register_new_resolver(f"oc.{resolver.__name__}", resolver, replace=True)
        yield
    finally:
        for resolver in (oc.env, oc.decode, oc.select):
            OmegaConf.register_new_resolver(f"oc.{resolver.__name__}", resolver, replace=True)


def _unmarked(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(OPEN, "${").replace(CLOSE, "}")
    if isinstance(value, dict):
        return {key: _unmarked(member) for key, member in value.items()}
    return [_unmarked(member) for member in value] if isinstance(value, list) else value
