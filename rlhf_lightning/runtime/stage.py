"""A row of the table of stages, :mod:`rlhf_lightning.stages`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A stage of the program.

    Args:
        name: as in `stage=<name>`; its settings are the configuration's key of that name.
        summary: what it does, for the help.
        runs: `module:function` below `rlhf_lightning.stages`, called with a :class:`rlhf_lightning.runtime.run.Run`.
        trains: it makes optimizer updates and can be resumed from a checkpoint.
        online: it generates and scores responses while it trains.
        generative: it computes logits of response tokens, unlike a reward model.
        needs_start: it cannot start from a tiny model that is built by the run.
        output: the file in its run folder that says it is done; None is never done.
        models: keys of the configuration that name further models, or map names, or names in names, to models.
        judges: it asks the judge of the configuration, where there is one, whatever the reward is.
        sources: keys of the configuration, beside those of `data`, that name rows, or map names to rows -> the split
            that they are, whose limit holds: "val" for data.val_rows.
    """

    name: str
    summary: str
    runs: str
    trains: bool = False
    online: bool = False
    generative: bool = True
    needs_start: bool = False
    output: str | None = "model/manifest.json"
    models: tuple[str, ...] = ()
    judges: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> Callable[[Any], float | None]:
        """Import and return the function that runs it."""
        module, _, function = self.runs.partition(":")
        return getattr(importlib.import_module(f"rlhf_lightning.stages.{module}"), function)
