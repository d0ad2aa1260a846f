"""What a row means: a demonstration, a preference or a prompt, from any of the layouts people publish."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from rlhf_lightning.data.beside import read_label, read_number, read_rank, read_rating, read_tools
from rlhf_lightning.data.layouts import Columns, Row, hint, listed, read_row
from rlhf_lightning.data.messages import (
    LeftOut,
    Message,
    RowError,
    bare,
    hh_messages,
    is_hh,
    is_hh_prompt,
    joined,
    need_list,
    need_string,
    need_text,
    opened,
    parsed,
    read_messages,
    turn,
    unweighted,
)  # fmt: skip

__all__ = [
    "Content", "Demonstration", "LeftOut", "Message", "Preference", "PromptRecord", "RowError", "check_length",
    "demonstration", "given_responses", "preference", "prompt", "rated",
]  # fmt: skip

Content = list[Message] | str
Tools = list[dict[str, Any]] | None
PLAIN = Columns()
DEMONSTRATIONS = ("conversation", "ranking", "pair", "rated", "single", "text")
PREFERENCES = ("ranking", "pair", "rated")
PROMPTS = ("single", "rated", "ranking", "pair", "prompt", "conversation", "text")
KINDS = {"demonstrations": DEMONSTRATIONS, "preferences": PREFERENCES, "prompts": PROMPTS}
"""What a data module reads -> the kinds of layouts it reads it from, the best first."""


@dataclass(frozen=True)
class Demonstration:
    """A conversation that ends with an assistant turn, or a raw text to continue; `tools` are JSON schemas."""

    content: Content
    tools: Tools = None


@dataclass(frozen=True)
class Preference:
    """A prompt with K >= 2 responses; `ranks` 0 is the best, ties share a rank, best first.

    `annotator` is who ranked them, `group` the group of annotators that they speak for.
    """

    prompt: Content
    responses: list[str]
    ranks: list[int]
    margin: float = 0.0
    label: float = 1.0
    annotator: str | None = None
    group: str | None = None
    tools: Tools = None


@dataclass(frozen=True)
class PromptRecord:
    """A prompt, the text of its last user turn, and every column of the row."""

    content: Content
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    tools: Tools = None


def demonstration(row: Row, columns: Columns = PLAIN) -> Demonstration:
    """Read a conversation, a prompt with its response, the best of a preference or ranking, or a raw text."""
    layout, view = read_row(row, columns, DEMONSTRATIONS)
    if layout is None:
        if "prompt" in view:
            raise _missing(view, ["response", "completion", "chosen", "messages"] if view["prompt"] else ["prompt"])
        if "responses" in view or "chosen" in view:
            preference(row, columns)
        raise _missing(view, ["messages", "prompt", "text"])
    if view.get("responses") is not None and layout.kind not in ("ranking", "conversation"):
        raise _missing(view, ["ranking"])
    tools = read_tools(view)
    if layout.kind == "text":
        if view.get("prompt"):
            raise _missing(view, ["response", "completion", "chosen", "messages"])
        if (text := parsed(view["text"], "text")) is view["text"]:
            return Demonstration(need_text(text, "text"))
        view = view | {"messages": text}
    if layout.kind in ("text", "conversation"):
        messages = _with_system(read_messages(view["messages"], "messages", columns.roles), view)
    elif layout.kind in ("ranking", "pair"):
        pair = preference(row, columns)
        best = pair.responses[pair.ranks.index(min(pair.ranks))]
        question = pair.prompt if isinstance(pair.prompt, list) else [turn("user", pair.prompt)]
        messages = [*question, turn("assistant", best)]
    else:
        if layout.kind == "rated" and read_rating(view, columns) is False:
            raise LeftOut("it is labelled false: SFT learns only what is labelled true")
        messages = _answered(view, columns)
    return Demonstration(_learnable(messages), tools)


def learned_turns(content: Content, turns: str) -> str:
    """Return which turns of a conversation are learned, "last" or "all": what its messages say comes first."""
    if isinstance(content, str) or not any("weight" in m for m in content):
        return turns
    return "last" if all(m.get("weight") == 0 for m in content[:-1] if m["role"] == "assistant") else "all"


def preference(row: Row, columns: Columns = PLAIN) -> Preference:
    """Read a chosen and a rejected response, as texts or as conversations that share the prompt, or a ranking.

    A ranking is `prompt`, `responses` and `ranking`, one rank per response, lower is better, equal for ties.
    """
    layout, view = read_row(row, columns, PREFERENCES)
    if layout is None:
        if view.get("responses") is not None:
            raise _missing(view, ["ranking"] if view.get("prompt") else ["prompt"])
        for key in ("chosen", "rejected"):
            if not view.get(key):
                raise _missing(view, [key])
        raise _missing(view, ["prompt"])
    if layout.kind == "rated":
        value = read_rating(view, columns)
        raise RowError(
            f"its response is rated {value}, and no row with the same prompt is rated otherwise (with data.window rows "
            "are not compared)"
        )
    extra: dict[str, Any] = {"margin": read_number(view, "margin", 0.0), "label": read_label(view, columns)}
    extra["tools"] = read_tools(view)
    if view.get("annotator") is not None:
        extra["annotator"] = str(view["annotator"])
    if view.get("group") not in (None, ""):
        extra["group"] = str(view["group"])
    if layout.kind == "ranking":
        return _ranking(view, columns, extra)
    shared, (chosen, rejected) = pair_of(view, columns)
    need_text(chosen, "chosen")
    need_text(rejected, "rejected")
    if chosen.strip() == rejected.strip():
        raise RowError("chosen and rejected are identical")
    return Preference(shared, [chosen, rejected], [0, 1], **extra)


def prompt(row: Row, columns: Columns = PLAIN) -> PromptRecord:
    """Read the prompt of any row: a conversation up to the turn the assistant should take.

    `metadata` has every column of the row. In it `messages` is the prompt; the turn of the assistant that followed it
    in the row's own messages is `completion`.
    """
    layout, view = read_row(row, columns, PROMPTS)
    if layout is None:
        raise _missing(view, ["prompt", "messages", "text"])
    metadata = dict(row) | {name: view[name] for name in columns.mapped if name != "prompt"}
    tools, content = read_tools(view), None
    if layout.kind == "text" and (content := parsed(view["text"], "text")) is view["text"]:
        text = need_text(content, "text")
        return PromptRecord(text, text, metadata, tools)
    if layout.kind in ("text", "conversation"):
        messages = _with_system(read_messages(content or view["messages"], "messages", columns.roles), view)
        if messages[-1]["role"] == "assistant":
            *messages, answer = messages
            metadata = {"completion": answer["content"]} | metadata
        messages = unweighted(messages)
    else:
        messages = prompt_of(view, columns) if view.get("prompt") else pair_of(view, columns)[0]
    _need_user(messages)
    last = need_text(next(m["content"] for m in reversed(messages) if m["role"] == "user"), "the last user turn")
    return PromptRecord(messages, last, metadata | {"messages": messages}, tools)


def given_responses(row: Row, columns: Columns = PLAIN) -> list[str]:
    """Read the responses of a row: a list of texts `responses`, ranked or not, or a pair, the chosen one first."""
    view = columns.view(row)
    texts = view.get("responses")
    if texts and not view.keys() & {"ranking", "chosen"}:
        texts = need_list(texts, "responses")
    elif not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        return preference(row, columns).responses
    return [need_string(text, f"responses[{k}]") for k, text in enumerate(texts)]


def rated(row: Row, columns: Columns) -> tuple[Row, Any, float] | None:
    """Return (what rows of equal prompts share, response, rating) of a row with one rated response; else None."""
    layout, view = read_row(row, columns, PREFERENCES)
    if layout is None or layout.kind != "rated":
        return None
    names = ("prompt", "system", "system_prompt", "tools", "functions", "group")
    shared = {name: view[name] for name in names if name in view}
    return shared, _final(_response(view), "response", columns), float(read_rating(view, columns))


# ---- prompts and responses -------------------------------------------------------------------------------------------


def prompt_of(view: Row, columns: Columns) -> list[Message]:
    """Return the turns of the column `prompt`, which the assistant is to answer."""
    value = parsed(view["prompt"], "prompt")
    if isinstance(value, str):
        turns = hh_messages(value) if is_hh_prompt(value) else [turn("user", need_text(value, "prompt"))]
        if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
            turns = turns[:-1]  # HH prompts end with an empty "Assistant:"
    else:
        turns = read_messages(value, "prompt", columns.roles)
    _need_user(turns)
    if turns[-1]["role"] == "assistant":
        raise RowError("prompt ends with a message of the assistant, so there is nothing to answer")
    return unweighted(_with_system(turns, view))


def _answered(view: Row, columns: Columns) -> list[Message]:
    """Return the conversation of a prompt and its response; of several turns in a response all are learned."""
    turns = _turns(_response(view), "response", columns)
    if view.get("reasoning_content"):
        if len(turns) > 1 or "reasoning_content" in turns[0]:
            raise RowError("the column reasoning_content is beside a response with turns or reasoning of its own")
        turns = [turns[0] | {"reasoning_content": need_string(view["reasoning_content"], "reasoning_content")}]
    messages, begin = joined(prompt_of(view, columns), turns, "response")
    answers = [m for m in messages[begin:] if m["role"] == "assistant"]
    if len(answers) < 2 or any("weight" in m for m in answers):
        return messages
    return [m | {"weight": float(i >= begin)} if m["role"] == "assistant" else m for i, m in enumerate(messages)]


def _response(view: Row) -> Any:
    return view["response"] if view.get("response") is not None else view["completion"]


def _turns(value: Any, key: str, columns: Columns) -> list[Message]:
    """Return a response as turns: a text, one message, a list of messages, or an HH text from its first turn."""
    value = parsed(value, key)
    if isinstance(value, list | tuple | dict):
        return read_messages(value, key, columns.roles)
    if need_string(value, key).startswith(("\n\nHuman:", "Human:")) and is_hh(value):
        return hh_messages(value)
    return [turn("assistant", need_text(value, key))]


def _final(value: Any, key: str, columns: Columns) -> str:
    """Return the text of a response given as text or as one message of the assistant."""
    turns = _turns(value, key, columns)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise RowError(f"{key} is not a text or a single assistant message")
    return _as_text(turns[0], key)


def _as_text(message: Message, key: str) -> str:
    """Return the content of a response that is nothing but text."""
    for name in ("tool_calls", "reasoning_content"):
        if name in message:
            raise RowError(f"{key} has {name}; the responses of a preference are compared as texts")
    if message.get("weight") == 0:
        raise RowError(f"{key} has weight 0, so there is nothing to compare")
    return need_text(message["content"], key)


def pair_of(view: Row, columns: Columns) -> tuple[list[Message], tuple[str, str]]:
    """Return the prompt that both sides share, and the response of each."""
    question = prompt_of(view, columns) if view.get("prompt") else None
    sides = []
    for key in ("chosen", "rejected"):
        value = parsed(view[key], key)
        if question is None and isinstance(value, str):
            if not is_hh(value):
                raise _missing(view, ["prompt"])
            turns = hh_messages(value)
        else:
            turns = _turns(value, key, columns)
        if turns[-1]["role"] != "assistant":
            raise RowError(f"{key} does not end with an assistant message")
        sides.append(_with_system(turns, view) if question is None else joined(question, turns, key)[0])
    good, bad = sides
    size = next((i for i, pair in enumerate(zip(good, bad, strict=False)) if bare([pair[0]]) != bare([pair[1]])), None)
    size = min(len(good), len(bad)) - 1 if size is None else size
    rests = good[size:], bad[size:]
    if any(rest[0]["role"] != "assistant" for rest in rests):
        raise RowError("chosen and rejected do not share the prompt")
    for key, rest in zip(("chosen", "rejected"), rests, strict=True):
        if len(rest) > 1:
            raise RowError(f"{key} has {len(rest)} turns after the shared prompt; a response of one turn is needed")
    shared = unweighted(good[:size])
    _need_user(shared)
    return shared, (_as_text(rests[0][0], "chosen"), _as_text(rests[1][0], "rejected"))


def ranked(view: Row, columns: Columns, blank: bool = False) -> tuple[list[str], list[int]]:
    """Return the responses of a ranking as they are listed, and the rank of each, 0 the best; all may be ties.

    Args:
        blank: responses may be empty: a model gave an empty one, and it was compared.
    """
    given = need_list(view["responses"], "responses")
    empty = [blank and isinstance(r, str) and not r.strip() for r in given]
    responses = [r if empty[i] else _final(r, f"responses[{i}]", columns) for i, r in enumerate(given)]
    ranks = [read_rank(r, f"ranking[{i}]") for i, r in enumerate(need_list(view["ranking"], "ranking"))]
    if len(ranks) != len(responses) or len(responses) < 2:
        raise RowError(f"{len(responses)} responses but {len(ranks)} ranks; give one rank each, at least two responses")
    levels = sorted(set(ranks))
    return responses, [levels.index(rank) for rank in ranks]


def _ranking(view: Row, columns: Columns, extra: dict[str, Any]) -> Preference:
    responses, ranks = ranked(view, columns)
    if len(set(ranks)) == 1:
        raise RowError("all responses have the same rank")
    for i, j in itertools.combinations(range(len(ranks)), 2):
        if ranks[i] != ranks[j] and responses[i].strip() == responses[j].strip():
            raise RowError(f"responses[{i}] and responses[{j}] are identical but ranked differently")
    order = sorted(range(len(ranks)), key=lambda i: ranks[i])
    shared = prompt_of(view, columns)
    return Preference(shared, [responses[i] for i in order], [ranks[i] for i in order], **extra)


def _learnable(messages: list[Message]) -> list[Message]:
    """Return a conversation in which something is learned, or raise a `RowError`."""
    if messages[-1]["role"] != "assistant":
        raise RowError("the last message is not the assistant's, so there is nothing to learn")
    _need_user(messages)
    if all(m.get("weight") == 0 for m in messages if m["role"] == "assistant"):
        raise RowError("every message of the assistant has weight 0, so there is nothing to learn")
    if not {"weight", "tool_calls", "reasoning_content"} & messages[-1].keys():
        need_text(messages[-1]["content"], "the last assistant message")
    return messages


def _with_system(turns: list[Message], view: Row) -> list[Message]:
    """Return the turns with the column `system` in front."""
    key = "system" if view.get("system") else "system_prompt"
    if not view.get(key):
        return turns
    text = need_string(view[key], key)
    own, _ = opened(turns)
    if own and own[0]["content"].strip() != text.strip():
        raise RowError(f"the column {key} and the system message of the conversation differ")
    return turns if own else [turn("system", text), *turns]


def _need_user(messages: list[Message]) -> None:
    said = [m["content"] for m in messages if m["role"] == "user"]
    if not any(text.strip() for text in said):
        raise RowError("every user turn is empty" if said else "there is no user turn")


def _missing(row: Row, keys: list[str]) -> RowError:
    if empty := [key for key in keys if key in row]:
        return RowError(f"{empty[0]} is empty{' (null)' if row[empty[0]] is None else ''}")
    return RowError(
        f"there is no {' or '.join(keys)}; {listed(row)}.{hint(keys[0], row)} Map a column with "
        f"data.columns.{keys[0]}=<column>"
    )


def check_length(prompt_tokens: int, max_length: int) -> None:
    """Raise a `RowError` when a prompt leaves no room for a response."""
    if prompt_tokens >= max_length:
        raise RowError(
            f"the prompt leaves no room within data.max_length={max_length}; it has {prompt_tokens} tokens: raise "
            "data.max_length, or leave such rows out with data.on_bad_row=skip"
        )
