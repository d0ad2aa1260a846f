"""Labeling as tests use it: a few rows, a store, and annotators."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_lightning.data.messages import Message
from rlhf_lightning.data.sources import read_source
from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.labeling.items import Item, read_items
from rlhf_lightning.feedback.labeling.service import Labeling, PageSettings
from rlhf_lightning.feedback.labeling.store import Store


def rows(count: int, responses: int = 2) -> list[dict[str, Any]]:
    """Return rows with distinct prompts and responses."""
    texts = [f"answer {k}" for k in range(responses)]
    return [
        {"id": f"row-{i}", "prompt": f"question {i}", "responses": [f"{t} to {i}" for t in texts]} for i in range(count)
    ]


def items_of(given: list[dict[str, Any]], mode: str = "compare", **options: Any) -> dict[str, Item]:
    """Return the items of rows."""
    return read_items(read_source(given, "train"), mode, **options)[0]


class Echo:
    """A model that repeats the last message, or fails when it says so."""

    def close(self) -> None:
        pass

    def __call__(self, messages: Sequence[Message], num_generations: int, seed_parts: Sequence[int | str]) -> list[str]:
        said = messages[-1]["content"]
        if said == "fail":
            raise UserError("the server is down")
        return [f"{said} {k} of {'/'.join(map(str, seed_parts))}" for k in range(num_generations)]


def labeling_of(
    folder: Path,
    given: list[dict[str, Any]] | dict[str, Item],
    annotators: Sequence[str] = ("anna", "ben"),
    mode: str = "compare",
    page: dict[str, Any] | None = None,
    **options: Any,
) -> Labeling:
    """Return annotators at work on rows, with a store in `folder`."""
    store = Store(folder / "labels.db", {"mode": mode, "seed": options.pop("seed", 0)})
    made = items_of(given, mode) if isinstance(given, list) else given
    chat = Echo() if mode == "chat" else None
    return Labeling(store, made, annotators, PageSettings(mode, **(page or {})), chat=chat, **options)


def label_all(labeling: Labeling, annotator: str, value: int = 1) -> int:
    """Label everything that an annotator is given, and return how many items that were."""
    count = 0
    while (task := labeling.state(annotator)["task"]) is not None:
        labeling.label(annotator, task["item"], f"{annotator}-{task['item']}", {"value": value, "seconds": 2})
        count += 1
    return count
