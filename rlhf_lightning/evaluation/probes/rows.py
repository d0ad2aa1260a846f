"""The rows of a probe: the small set in this package, a file of the user's, or the built-in world."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_lightning.data.messages import Message, RowError, need_string, read_messages
from rlhf_lightning.data.sources import Source, read_source
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.evaluation.probes.probe import Probe, Row
from rlhf_lightning.ops.seeding import permutation
from rlhf_lightning.world.gold import gold, row_problem

DATA = Path(__file__).with_name("data")
WORLD_ROWS = 128
"""Rows of the world where no number is given."""


def read_rows(probe: Probe, data: Any = None, count: int | None = None, seed: int = 0) -> list[Row]:
    """Return the rows of a probe, checked.

    Args:
        data: None is the set in this package, "world" the built-in world, else a file or a Source.
        count: rows, at most; drawn by the seed and kept in order. None is all, of the world `WORLD_ROWS`.

    Raises:
        UserError: a row without a column that the probe needs, or a file that cannot be read.
    """
    if data == "world":
        return probe.world_rows(count or WORLD_ROWS, seed)
    source = read_source(DATA / f"{probe.name}.jsonl" if data is None else data, "val", name="probe.data")
    rows = list(checked(probe, source))
    if not rows:
        raise UserError(f"{source.name} has no rows")
    if count is None or count >= len(rows):
        return rows
    return [rows[place] for place in sorted(permutation(len(rows), seed, "probe", probe.name)[:count].tolist())]


def checked(probe: Probe, source: Source) -> Iterable[Row]:
    """Yield the rows of `source`, or raise a UserError that names the row and what it lacks."""
    for where, row in source.rows():
        reason = str(row) if isinstance(row, RowError) else None
        if not reason and not isinstance(row, dict):
            reason = f"it is a {type(row).__name__}, not an object"
        if not reason:
            try:
                need_string(json.dumps(row, ensure_ascii=False, default=str), "it")
            except RowError as error:
                reason = str(error)
        if not reason:
            missing = [name for name in probe.columns if row.get(name) in (None, "", [])]
            if missing:
                known = ", ".join([*probe.columns, *probe.optional])
                reason = f"it has no {missing[0]}; columns of probe={probe.name}: {known}.{nearest(missing[0], row)}"
        reason = reason or probe.problem(row)
        if reason:
            raise UserError(f"{source.name}, {where}: {reason}")
        yield row


def conversation(prompt: Any) -> list[Message]:
    """Return the messages of the column `prompt`: a text is the user's, a list of messages is read as in data files.

    Raises:
        RowError: it is neither.
    """
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else read_messages(prompt, "prompt")


def prompt_problem(row: Row) -> str | None:
    """Return why a row's `prompt` is no conversation that ends with a user; None where it is one."""
    try:
        turns = conversation(row["prompt"])
    except RowError as error:
        return str(error)
    return None if turns[-1]["role"] == "user" else f"prompt ends with the role {turns[-1]['role']}, not with user"


def listed(value: Any) -> list[str]:
    """Return the texts of a column with several: a list, a JSON list as CSV has it, or one text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    return [str(text) for text in value] if isinstance(value, list) else [str(value)]


def is_world(row: Row) -> bool:
    """Return whether a row is a prompt of the world, of which the gold reward says what is right."""
    return row_problem(row) is None


def names_one(texts: Any, response: str) -> bool:
    """Return whether a response has the words of one of `texts`, one after the other, whatever their case."""
    words = f" {normalized(response)} "
    return any(f" {wanted} " in words for text in listed(texts) if (wanted := normalized(text)))


def normalized(text: str) -> str:
    """Return the words of a text in lower case: letters and digits, apostrophes left out."""
    text = text.lower().replace("’", "").replace("'", "")
    return " ".join("".join(c if c.isalnum() else " " for c in text).split())


def is_correct(row: Row, response: str) -> bool:
    """Return whether a response is right: by the gold reward of the world, else where it names a text of `correct`."""
    return gold(row, response).correct if is_world(row) else names_one(row["correct"], response)


def world_prompts(families: Iterable[str], count: int, seed: int) -> list[Row]:
    """Return held-out prompts of the world, as many of each family as there are or `count` has room for."""
    from rlhf_lightning.world.prompts import prompts

    families = list(families)
    rows = []
    for place, family in enumerate(families):
        known = prompts(family, "val")
        wanted = count // len(families) + (place < count % len(families))
        chosen = sorted(permutation(len(known), seed, "probe", family)[:wanted].tolist())
        rows += [known[number].row(number) for number in chosen]
    return rows
