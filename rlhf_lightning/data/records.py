"""What a row means: a demonstration, a preference or a prompt, from any of the layouts people publish."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field
from typing import Any

from rlhf_lightning.errors import nearest

Message = dict[str, Any]
Content = list[Message] | str
ROLES = ("system", "user", "assistant")
HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


class RowError(ValueError):
    """What is wrong with one row; the caller adds the file and the row number."""


@dataclass(frozen=True)
class Demonstration:
    """A conversation that ends with an assistant turn, or a raw text to continue."""

    content: Content
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Preference:
    """A prompt with K >= 2 responses; `ranks` 0 is the best, ties share a rank, best first."""

    prompt: Content
    responses: list[str]
    ranks: list[int]
    margin: float = 0.0
    label: float = 1.0
    annotator: str | None = None
    tools: list[Any] | None = None


@dataclass(frozen=True)
class PromptRecord:
    """A prompt, the text of its last user turn, and every other column of the row."""

    content: Content
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    tools: list[Any] | None = None


def demonstration(row: dict[str, Any]) -> Demonstration:
    """Read `messages`, `text`, `prompt` + `response`/`completion`, Alpaca columns, or the chosen side of a pair."""
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages", row)
        if messages[-1]["role"] != "assistant":
            raise RowError("the last message is not the assistant's, so there is nothing to learn")
        _need_user(messages)
        _need_text(messages[-1]["content"], "the last assistant message")
        return Demonstration(messages)
    if row.get("chosen") is not None or row.get("responses") is not None:
        pair = preference(row)
        best = pair.responses[pair.ranks.index(min(pair.ranks))]
        prompt = pair.prompt if isinstance(pair.prompt, list) else [_turn("user", pair.prompt)]
        return Demonstration([*prompt, _turn("assistant", best)])
    if row.get("instruction") is not None and row.get("output") is not None:
        question = _string(row["instruction"], "instruction")
        if row.get("input"):
            question = f"{question}\n\n{_string(row['input'], 'input')}"
        row = {"prompt": question, "response": row["output"], "system": row.get("system")}
    if row.get("prompt") is not None:
        key = next((k for k in ("response", "completion") if row.get(k) is not None), None)
        if key is None:
            raise _missing(row, ["response", "completion", "chosen", "messages"])
        prompt = _prompt(row)
        return Demonstration([*prompt, _turn("assistant", _final(row[key], key))])
    if row.get("text") is not None:
        return Demonstration(_need_text(_string(row["text"], "text"), "text"))
    raise _missing(row, ["messages", "prompt", "text"])


def preference(row: dict[str, Any]) -> Preference:
    """Read `prompt`/`chosen`/`rejected` as text or messages, whole conversations, or a ranking.

    A ranking is `prompt`, `responses` and `ranking`, one rank per response, lower is better, equal for ties.
    """
    extra: dict[str, Any] = {"margin": _number(row, "margin", 0.0), "label": _number(row, "label", 1.0)}
    if row.get("annotator") is not None:
        extra["annotator"] = str(row["annotator"])
    if not 0 <= extra["label"] <= 1:
        raise RowError(f"label is {extra['label']}, outside 0..1 (the probability that chosen is better)")
    if row.get("responses") is not None:
        return _ranking(row, extra)
    for key in ("chosen", "rejected"):
        if row.get(key) is None:
            raise _missing(row, [key])
    prompt, (chosen, rejected) = _pair(row)
    _need_text(chosen, "chosen")
    _need_text(rejected, "rejected")
    if chosen.strip() == rejected.strip():
        raise RowError("chosen and rejected are identical")
    return Preference(prompt, [chosen, rejected], [0, 1], **extra)


def prompt(row: dict[str, Any]) -> PromptRecord:
    """Read the prompt of any row: a conversation up to the turn the assistant should take."""
    if row.get("prompt") is not None:
        content: Content = _prompt(row)
    elif row.get("messages") is not None:
        messages = _messages(row["messages"], "messages", row)
        content = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    elif row.get("chosen") is not None and row.get("rejected") is not None:
        content = preference(row).prompt
    elif row.get("instruction") is not None:
        text = _string(row["instruction"], "instruction")
        content = [_turn("user", f"{text}\n\n{row['input']}" if row.get("input") else text)]
    elif row.get("text") is not None:
        content = _need_text(_string(row["text"], "text"), "text")
    else:
        raise _missing(row, ["prompt", "messages", "text"])
    used = {"prompt", "chosen", "rejected", "responses", "text"}
    metadata = {k: v for k, v in row.items() if k not in used}
    if isinstance(content, str):
        return PromptRecord(content, content, metadata)
    _need_user(content)
    last = next(m["content"] for m in reversed(content) if m["role"] == "user")
    return PromptRecord(content, last, metadata | {"messages": content})


def _pair(row: dict[str, Any]) -> tuple[list[Message], tuple[str, str]]:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if row.get("prompt") is not None:
            return _prompt(row), (chosen, rejected)
        if not (HH_TURN.search(chosen) and HH_TURN.search(rejected)):
            raise _missing(row, ["prompt"])
        chosen, rejected = _hh(chosen), _hh(rejected)
    good, bad = (_messages(x, k, row) for x, k in ((chosen, "chosen"), (rejected, "rejected")))
    for name, turns in (("chosen", good), ("rejected", bad)):
        if turns[-1]["role"] != "assistant":
            raise RowError(f"{name} does not end with an assistant message")
    if len(good) == 1 and len(bad) == 1 and row.get("prompt") is not None:
        shared = _prompt(row)
    elif good[:-1] == bad[:-1]:
        shared = good[:-1]
    else:
        raise RowError("chosen and rejected do not share the prompt")
    _need_user(shared)
    return shared, (good[-1]["content"], bad[-1]["content"])


def _ranking(row: dict[str, Any], extra: dict[str, Any]) -> Preference:
    responses = [_final(r, f"responses[{i}]") for i, r in enumerate(_list(row["responses"], "responses"))]
    if row.get("ranking") is None:
        raise _missing(row, ["ranking"])
    ranks = [_rank(r, f"ranking[{i}]") for i, r in enumerate(_list(row["ranking"], "ranking"))]
    if len(ranks) != len(responses) or len(responses) < 2:
        raise RowError(f"{len(responses)} responses but {len(ranks)} ranks; give one rank each, at least two responses")
    if len(set(ranks)) == 1:
        raise RowError("all responses have the same rank")
    for i, j in itertools.combinations(range(len(ranks)), 2):
        if ranks[i] != ranks[j] and responses[i].strip() == responses[j].strip():
            raise RowError(f"responses[{i}] and responses[{j}] are identical but ranked differently")
    order = sorted(range(len(ranks)), key=lambda i: ranks[i])
    levels = sorted(set(ranks))
    for i, text in enumerate(responses):
        _need_text(text, f"responses[{i}]")
    return Preference(_prompt(row), [responses[i] for i in order], [levels.index(ranks[i]) for i in order], **extra)


def _prompt(row: dict[str, Any]) -> list[Message]:
    value = row.get("prompt")
    if value is None:
        raise _missing(row, ["prompt"])
    if isinstance(value, str):
        turns = _hh(value) if HH_TURN.match(value) else [_turn("user", _need_text(value, "prompt"))]
        if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
            turns = turns[:-1]  # HH prompts end with an empty "Assistant:"
        if row.get("system"):
            turns = [_turn("system", _string(row["system"], "system")), *turns]
    else:
        turns = _messages(value, "prompt", row)
    _need_user(turns)
    return turns


def _messages(value: Any, key: str, row: dict[str, Any]) -> list[Message]:
    if isinstance(value, str):
        value = _hh(value) if HH_TURN.search(value) else [_turn("assistant", value)]
    messages = []
    for number, message in enumerate(_list(value, key)):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise RowError(f"{key}[{number}] is not an object with role and content")
        if message["role"] not in ROLES:
            hint = nearest(str(message["role"]), ROLES)
            raise RowError(f"{key}[{number}].role is {message['role']!r}, not one of {', '.join(ROLES)}.{hint}")
        messages.append(_turn(message["role"], _string(message["content"], f"{key}[{number}].content")))
    if not messages:
        raise RowError(f"{key} is empty")
    if row.get("system") and messages[0]["role"] != "system" and len(messages) > 1:
        messages = [_turn("system", _string(row["system"], "system")), *messages]
    return messages


def _hh(text: str) -> list[Message]:
    """Split "\\n\\nHuman: ...\\n\\nAssistant: ..." into turns."""
    parts = HH_TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [_turn(roles[name], content.strip()) for name, content in zip(parts[1::2], parts[2::2], strict=True)]


def _final(value: Any, key: str) -> str:
    """Return the text of a response given as text or as one assistant message."""
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
            raise RowError(f"{key} is not a text or a single assistant message")
        value = value[0].get("content")
    return _need_text(_string(value, key), key)


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _need_user(messages: list[Message]) -> None:
    if not any(m["role"] == "user" for m in messages):
        raise RowError("there is no user turn")


def _need_text(text: str, key: str) -> str:
    if not text.strip():
        raise RowError(f"{key} is empty")
    return text


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{key} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{key} contains a lone surrogate, which is not valid text") from None
    return value


def _rank(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"{key} is {value!r}, not a number")
    return value


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise RowError(f"{key} is {type(value).__name__}, not a list")
    return list(value)


def _number(row: dict[str, Any], key: str, default: float) -> float:
    value = row.get(key)
    if value is None or value == "":
        return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RowError(f"{key} is {value!r}, not a number") from None
    if not math.isfinite(number):
        raise RowError(f"{key} is {value!r}, not a finite number")
    return number


def _missing(row: dict[str, Any], keys: list[str]) -> RowError:
    if empty := [key for key in keys if key in row]:
        return RowError(f"{empty[0]} is empty (null)")
    hint = nearest(keys[0], row.keys())
    return RowError(f"there is no {' or '.join(keys)}; the row has {', '.join(map(str, row)) or 'nothing'}.{hint}")


def check_length(prompt_tokens: int, max_length: int) -> None:
    """Raise a `RowError` when a prompt leaves no room for a response."""
    if prompt_tokens >= max_length:
        raise RowError(f"the prompt leaves no room within data.max_length={max_length}; it has {prompt_tokens} tokens")
