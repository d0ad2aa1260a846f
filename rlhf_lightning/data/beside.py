"""The columns beside a prompt and its responses: tools, margin, label, rating, rank."""

from __future__ import annotations

import json
import math
from typing import Any

from rlhf_lightning.data.layouts import Columns, Row, number_of
from rlhf_lightning.data.messages import RowError, need_json, need_list, need_string

NO_LABEL = "data.columns.label=null leaves it to rewards"
WORDS = {"true": True, "false": False}


def read_tools(view: Row) -> list[dict[str, Any]] | None:
    """Return the JSON schemas of the column `tools`, or of `functions` in the older OpenAI format."""
    key = "tools" if view.get("tools") else "functions"
    if not view.get(key):
        return None
    tools = need_list(need_json(view[key], key), key)
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"{key} is not a list of JSON schemas")
    need_string(json.dumps(tools, ensure_ascii=False, default=str), key)
    if key == "functions":
        tools = [{"type": "function", "function": tool} for tool in tools]
    return tools or None


def read_label(view: Row, columns: Columns) -> float:
    """Return the probability that the chosen response is better.

    A label of 0 says that the rejected one is better for sure: that is the number of a class rather than a
    probability, unless the user names the column.
    """
    value = read_number(view, "label", 1.0, f" (the probability that chosen is better); {NO_LABEL}")
    if not 0 <= value <= 1:
        raise RowError(f"label is {value:g}, outside 0..1 (the probability that chosen is better); {NO_LABEL}")
    if value == 0 and "label" not in columns.mapped:
        raise RowError(
            f"label is {view['label']}, so chosen would be the worse one: data.columns.label=label reads it as the "
            f"probability that chosen is better; {NO_LABEL}"
        )
    return value


def read_rating(view: Row, columns: Columns) -> bool | float:
    """Return how good a single response is: true or false, or a number, more is better."""
    key = "rating" if view.get("rating") is not None else "label"
    value = WORDS.get(str(view[key]).lower(), view[key])
    if isinstance(value, bool):
        return value
    number = read_number(view, key, 0.0)
    if key == "label":
        if "label" not in columns.mapped:
            raise RowError(
                f"label is {value} beside a single response: data.columns.label=label reads it as whether the "
                f"response is good, as true and false; {NO_LABEL}"
            )
        return bool(number)
    return number


def read_rank(value: Any, key: str) -> float:
    """Return the rank of a response, a number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(number_of(value, key)):
        raise RowError(f"{key} is {str(value)[:40]!r}, not a number")
    return value


def read_number(row: Row, key: str, default: float, meaning: str = "") -> float:
    """Return a finite number, `default` where the row has none."""
    value = row.get(key)
    if value is None or value == "":
        return default
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise RowError(f"{key} is {str(value)[:40]!r}, not a number{meaning}") from None
    if not math.isfinite(number):
        raise RowError(f"{key} is {value!r}, not a finite number")
    return number
