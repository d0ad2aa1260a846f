"""Conversations as data sets write them, made into messages with one role and one text each."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from rlhf_lightning.errors import nearest

Message = dict[str, Any]
"""`role` and `content`, and where the data has them `reasoning_content`, `tool_calls`, `name`, `tool_call_id`, and
`weight` of an assistant message: 1.0 where it is to be learned, 0.0 where not."""

ROLES = ("system", "user", "assistant", "tool", "developer")
ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "function_call": "assistant",
    "function": "tool", "observation": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
"""Other names of roles, of ShareGPT, Gemma, Llama and the older OpenAI format."""
FIELD_NAMES = {"from": "role", "value": "content", "reasoning": "reasoning_content", "thinking": "reasoning_content"}
FIELDS = {"role", "content", "reasoning_content", "tool_calls", "function_call", "name", "tool_call_id"}
REFUSED = ("tools", "functions", "channel", "refusal", "audio", "image", "images", "video")
"""Fields that belong to what is learned and are not read."""
FLAGS = ("weight", "train", "loss")
"""Fields of a message that say whether it is learned."""
MESSAGES_TEXT = re.compile(r"""\s*(?:\[\s*)?\{\s*["'](?:role|content|from|value)["']\s*:""")
"""How messages begin that are stored as text."""
LONGEST_PRINTED = 1 << 20
"""Characters of the longest text that is read as Python prints it, which takes much memory."""
DEEPEST = 200
"""Lists and objects inside each other in a row: others cannot be written again."""
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


class RowError(ValueError):
    """What is wrong with one row, on one line; the caller adds the file and the row number."""

    def __init__(self, reason: str) -> None:
        printable = reason.encode("utf-8", "backslashreplace").decode()
        super().__init__(" ".join(printable.split("\n")))


class LeftOut(RowError):
    """Why a good row is not for this stage: it is counted, and stops no run."""


def read_messages(value: Any, key: str, roles: Mapping[str, str] | None = None) -> list[Message]:
    """Return the messages of a list, of one message, of messages stored as JSON text, or of an HH text.

    Args:
        value: messages with `role` and `content`, or `from` and `value`.
        key: the column, for messages of errors.
        roles: the data's names of roles -> ours, beside `ROLE_NAMES`.

    Raises:
        RowError: anything that is not a conversation.
    """
    value = parsed(value, key)
    if isinstance(value, str):
        if not is_hh(value):
            raise RowError(f"{key} is a text, not a list of messages")
        return hh_messages(value)
    listed = [value] if isinstance(value, dict) and not _is_columnar(value) else need_list(value, key)
    if not listed:
        raise RowError(f"{key} is empty")
    return [_message(message, f"{key}[{number}]", roles or {}) for number, message in enumerate(listed)]


def parsed(value: Any, key: str) -> Any:
    """Return the messages that a text holds, as JSON or as Python prints them; another value as it is."""
    if not isinstance(value, str) or not MESSAGES_TEXT.match(value):
        return value
    for read in (json.loads, ast.literal_eval) if len(value) < LONGEST_PRINTED else (json.loads,):
        try:
            return shallow(read(value), key)
        except RowError:
            raise
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise RowError(f"{key} begins like messages stored as text, and is no JSON: {value[:60]!r}")


def _message(message: Any, key: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"{key} is not an object with role and content")
    fields = {str(name): inner for name, inner in message.items() if inner is not None}
    fields = {ours: fields[name] for name, ours in FIELD_NAMES.items() if name in fields} | fields
    if "role" not in fields:
        raise RowError(f"{key} is not an object with role and content")
    if refused := [name for name in REFUSED if fields.get(name)]:
        advice = ", the column tools is" if refused[0] in ("tools", "functions") else ""
        raise RowError(f"{key}.{refused[0]} is not read{advice}")
    given = str(fields["role"])
    role = roles.get(given) or (given if given in ROLES else ROLE_NAMES.get(given.lower(), given.lower()))
    if role not in ROLES:
        hint = nearest(given, ROLES) or f" Map it with data.columns.role.{given}=<role>"
        raise RowError(f"{key}.role is {given!r}, not one of {', '.join(ROLES)}.{hint}")
    calls = _tool_calls(fields, given, key)
    content = fields.get("content", "" if calls and "content" not in fields else None)
    if content is None:
        raise RowError(f"{key} is not an object with role and content")
    result = turn(role, "" if calls and given == "function_call" else _text(content, f"{key}.content"))
    reasoning = fields.get("reasoning_content")
    if reasoning:
        result["reasoning_content"] = need_string(reasoning, f"{key}.reasoning_content")
    if calls:
        result["tool_calls"] = calls
    result |= {name: need_string(fields[name], f"{key}.{name}") for name in ("name", "tool_call_id") if name in fields}
    if role != "assistant" and (calls or reasoning):
        raise RowError(f"{key} has reasoning or tool calls, which only the assistant has; its role is {role}")
    weight = _weight(fields, key)
    if weight is not None and role == "assistant":
        result["weight"] = weight
    elif weight:
        raise RowError(f"{key} is to be learned, and its role is {role}; only messages of the assistant are learned")
    return result


def _text(value: Any, key: str) -> str:
    """Return a content: a text, or the joined text parts of a list."""
    if not isinstance(value, list | tuple):
        return need_string(value, key)
    texts = []
    for number, part in enumerate(value):
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            raise RowError(f"{key}[{number}] is a part of type {kind}; only text is read")
        texts.append(need_string(part.get("text") if isinstance(part, dict) else part, f"{key}[{number}]"))
    return "".join(texts)


def _tool_calls(fields: Mapping[str, Any], given: str, key: str) -> list[dict[str, Any]]:
    """Return the tool calls of a message in Hugging Face's format, with arguments as an object."""
    value = fields.get("tool_calls")
    if not value and given != "function_call" and "function_call" not in fields:
        return []
    if given == "function_call":  # ShareGPT: the content is the call, or several
        value = need_json(fields.get("content"), f"{key}.value")
        value = value if isinstance(value, list) else [value]
    elif "function_call" in fields:
        value = [*(value or []), fields["function_call"]]
    calls = []
    for number, call in enumerate(need_list(need_json(value or [], f"{key}.tool_calls"), f"{key}.tool_calls")):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{key}.tool_calls[{number}] is not an object with the name of a function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = need_json(arguments or "{}", f"{key}.tool_calls[{number}].arguments")
        call = {"type": "function"} | call if "function" in call else {"type": "function"}
        calls.append(call | {"function": function | {"arguments": {} if arguments is None else arguments}})
    need_string(json.dumps(calls, ensure_ascii=False, default=str), f"{key}.tool_calls")
    return calls


def _weight(fields: Mapping[str, Any], key: str) -> float | None:
    """Return 1.0 or 0.0 where a message says whether it is learned, else None."""
    found = {name: fields[name] for name in FLAGS if name in fields}
    for name, value in found.items():
        if value not in (0, 1):  # also False and True
            raise RowError(f"{key}.{name} is {value!r}, not 0 or 1: a message is learned or not")
    if len(values := {float(value) for value in found.values()}) > 1:
        raise RowError(f"{key}: {' and '.join(found)} disagree on whether it is learned")
    return values.pop() if values else None


def unread_fields(value: Any) -> set[str]:
    """Return the fields of messages that nothing reads."""
    listed = value if isinstance(value, list) else []
    messages = [m for m in listed if isinstance(m, dict) and {"role", "from"} & m.keys()]
    known = {*FIELDS, *FIELD_NAMES, *FLAGS, *REFUSED}
    return {str(name) for m in messages for name, inner in m.items() if inner is not None} - known


# ---- HH: "\n\nHuman: ...\n\nAssistant: ..." --------------------------------------------------------------------------


def is_hh(text: str) -> bool:
    """Return whether a text is a conversation in the markers of HH, from its first word or after a preamble."""
    names = HH_TURN.findall(text)
    return "Human" in names and "Assistant" in names


def is_hh_prompt(text: str) -> bool:
    """Return whether a prompt is in the markers of HH: it begins with one, or invites the assistant at its end."""
    if text.startswith("\n\nHuman:"):
        return True
    return (text.startswith("Human:") or text.rstrip().endswith("\n\nAssistant:")) and is_hh(text)


def hh_messages(text: str) -> list[Message]:
    """Split an HH text into turns; text before the first marker is the system message."""
    before, *parts = HH_TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [turn(roles[name], content.strip()) for name, content in zip(parts[::2], parts[1::2], strict=True)]
    return [turn("system", before.strip()), *turns] if before.strip() else turns


# ---- conversations --------------------------------------------------------------------------------------------------


def joined(before: list[Message], turns: list[Message], key: str) -> tuple[list[Message], int]:
    """Return the conversation of a prompt and turns that follow or repeat it, and where what follows begins.

    Turns repeat the prompt from its first message on, from a later one, or with turns before it.
    """
    (system, body), (own, rest) = opened(before), opened(turns)
    if system and own and bare(system) != bare(own):
        raise RowError(f"the system messages of prompt and {key} differ")
    head = own or system
    if rest and rest[0]["role"] == "assistant":
        return [*head, *body, *rest], len(head) + len(body)
    first, second = bare(body), bare(rest)
    for end in range(len(second), len(first) - 1, -1):
        if second[end - len(first) : end] == first:
            return [*head, *rest], len(head) + end
    for size in range(len(second), 0, -1):
        if first[-size:] == second[:size]:
            return [*head, *body, *rest[size:]], len(head) + len(body)
    raise RowError(f"{key} is a conversation that does not contain the prompt; data.columns.prompt=null reads it alone")


def opened(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """Return the system message of a conversation, as a list of at most one, and the rest."""
    size = 1 if turns and turns[0]["role"] in ("system", "developer") else 0
    return turns[:size], turns[size:]


def bare(turns: list[Message]) -> list[Message]:
    """Return the turns as they are compared: without weights and surrounding white space."""
    return [m | {"content": m["content"].strip()} for m in unweighted(turns)]


def unweighted(messages: list[Message]) -> list[Message]:
    """Return the messages without what says whether they are learned."""
    return [{name: value for name, value in m.items() if name != "weight"} for m in messages]


# ---- values ----------------------------------------------------------------------------------------------------------


def turn(role: str, content: str) -> Message:
    """Return a message."""
    return {"role": role, "content": content}


def need_string(value: Any, key: str) -> str:
    """Return a text that can be encoded, or raise a `RowError`."""
    if not isinstance(value, str):
        raise RowError(f"{key} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{key} contains a lone surrogate, which is not valid text") from None
    return value


def need_text(value: Any, key: str) -> str:
    """Return a text that is not blank, or raise a `RowError`."""
    if not need_string(value, key).strip():
        raise RowError(f"{key} is empty")
    return value


def need_json(value: Any, key: str) -> Any:
    """Return what a JSON text holds; another value as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        raise RowError(f"{key} is not JSON: {value[:60]!r}") from None
    return shallow(found, key)


def _is_columnar(value: dict[str, Any]) -> bool:
    """Return whether an object has lists of one length: how `datasets` keeps a list of objects."""
    return bool(value) and all(isinstance(v, list) for v in value.values()) and len(set(map(len, value.values()))) == 1


def shallow(value: Any, key: str) -> Any:
    """Return a value with at most `DEEPEST` lists and objects inside each other, or raise a `RowError`."""
    level, depth = [value], 0
    while level := [
        inner
        for outer in level
        if isinstance(outer, list | dict)
        for inner in (outer.values() if isinstance(outer, dict) else outer)
        if isinstance(inner, list | dict)
    ]:
        depth += 1
        if depth > DEEPEST:
            raise RowError(f"{key} has lists or objects nested more than {DEEPEST} deep")
    return value


def need_list(value: Any, key: str) -> list[Any]:
    """Return a list, or raise a `RowError`; also one that is stored as JSON text, or column by column."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = need_json(value, key)
    if isinstance(value, dict) and _is_columnar(value):
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise RowError(f"{key} is {type(value).__name__}, not a list")
    return list(value)
