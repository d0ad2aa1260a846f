"""The table of judges, what `judge=<name>` chooses. A new one is a file here, a row, and a file in conf/judge."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.judges.judge import Judge


@dataclass(frozen=True)
class JudgeKind:
    """A kind of judge.

    Args:
        name: the `kind` in its settings.
        makes: `module:function` that takes the other settings as keyword arguments and returns the judge.
        model: the setting that names a model folder or hub name, a parent of the run; None where there is none.
    """

    name: str
    makes: str
    model: str | None = None

    def load(self) -> Callable[..., Judge]:
        """Import and return what makes it."""
        module, _, function = self.makes.partition(":")
        return getattr(importlib.import_module(module), function)


JUDGES = {
    kind.name: kind
    for kind in (
        JudgeKind("local", "rlhf_lightning.judges.local:local_judge", model="model"),
        JudgeKind("server", "rlhf_lightning.judges.server:server_judge"),
        JudgeKind("world", "rlhf_lightning.judges.world:WorldJudge"),
        JudgeKind("many", "rlhf_lightning.judges.voting:Jury"),
    )
}


def load_judge(settings: Mapping[str, Any], key: str = "judge") -> Judge:
    """Return the judge that settings name by their `kind`; settings that it does not take belong to others.

    Raises:
        UserError: no such kind, or settings that it refuses.
    """
    kind = settings.get("kind")
    if kind not in JUDGES:
        given = "no judge is chosen" if kind is None else f"{key}.kind={kind} is no judge"
        raise UserError(f"{given}: judge= one of {', '.join(JUDGES)}.{nearest(str(kind), JUDGES) if kind else ''}")
    make = JUDGES[kind].load()
    accepted = inspect.signature(make).parameters
    return make(**{name: value for name, value in settings.items() if name in accepted})


def models(settings: Mapping[str, Any] | None) -> list[str]:
    """Return the folders and hub names of the models that a judge of these settings loads into this process."""
    found: list[str] = []
    with_models(settings or {}, lambda name: found.append(name) or name)
    return found


def with_models(settings: Mapping[str, Any], resolve: Callable[[str], str]) -> dict[str, Any]:
    """Return settings of a judge with the names of its models resolved; the judge keeps the name that was given."""
    result, kind = dict(settings), JUDGES.get(str(settings.get("kind")))
    if kind is not None and kind.model and (given := settings.get(kind.model)):
        result[kind.model] = resolve(str(given))
        result["name"] = settings.get("name") or Path(str(given)).name
    if members := settings.get("members"):
        result["members"] = {name: with_models(member, resolve) for name, member in members.items()}
    return result
