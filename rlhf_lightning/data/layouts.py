"""The layouts of rows that people publish: one table, from the columns a row has to the columns that are read.

A row is read by the first layout of its kind whose columns it has. What no layout reads is metadata: rewards get it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rlhf_lightning.data.messages import ROLES, RowError, need_list, need_string, need_text, unread_fields
from rlhf_lightning.errors import UserError, nearest

VERSION = 2
"""Part of every key of tokenized rows; raise it when the same row is read differently."""

Row = dict[str, Any]
READ = (
    "messages", "prompt", "response", "completion", "chosen", "rejected", "responses", "ranking", "rating", "text",
    "system", "tools", "reasoning_content", "margin", "label", "annotator", "group", "answer",
)  # fmt: skip
"""Columns that are read; other names are mapped to them. `answer` is read by rewards only."""
PROMPT = {"system", "system_prompt", "tools", "functions"}
VERDICT = {"margin", "label", "annotator", "group"}
BESIDE = {
    "conversation": PROMPT, "single": PROMPT | {"reasoning_content"}, "rated": PROMPT | {"reasoning_content", "group"},
    "pair": PROMPT | VERDICT, "ranking": PROMPT | VERDICT, "prompt": PROMPT, "text": set[str](),
}  # fmt: skip
"""Kind of a layout -> columns that are read beside it."""


class Columns:
    """Which column of the data is which of ours, and which of its roles; `data.columns` of the configuration.

    `mapped` has our columns that are read from one that the user names.

    Args:
        mapping: one of `READ` -> the data's column, None for a column that is not to be read; `role` -> a mapping of
            the data's roles to ours.

    Raises:
        UserError: a name that is none of ours.
    """

    def __init__(self, mapping: Mapping[str, Any] | None = None) -> None:
        given = dict(_mapping(mapping, "data.columns"))
        self.roles = {
            str(name): str(role) for name, role in _mapping(given.pop("role", None), "data.columns.role").items()
        }
        self.names = {str(name): None if column is None else str(column) for name, column in given.items()}
        self.mapped = frozenset(name for name, column in self.names.items() if column is not None)
        for name in self.names:
            if name not in READ:
                raise UserError(f"data.columns.{name} is not one of {', '.join(READ)}, role.{nearest(name, READ)}")
        for name, role in self.roles.items():
            if role not in ROLES:
                raise UserError(
                    f"data.columns.role.{name}={role!r} is not one of {', '.join(ROLES)}.{nearest(role, ROLES)}"
                )

    @property
    def key(self) -> list[Any]:
        """What decides how a row is read."""
        return [VERSION, sorted(self.names.items(), key=str), sorted(self.roles.items())]

    def view(self, row: Row) -> Row:
        """Return the row with our names of its columns.

        Raises:
            RowError: a row without a column that is mapped.
        """
        if isinstance(row, RowError):  # what a source makes of a line that is no row
            raise row
        if not isinstance(row, dict):
            raise RowError(f"the row is {type(row).__name__}, not an object")
        if isinstance(row, Canonical) or not self.names:
            return row
        for name, column in self.names.items():
            if column is not None and column not in row:
                raise RowError(f"data.columns.{name}={column}: there is no {column}; {listed(row)}.{hint(column, row)}")
        taken = {*self.names, *self.names.values()}
        rest = {name: value for name, value in row.items() if name not in taken}
        return rest | {name: row[column] for name, column in self.names.items() if column is not None}


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{key}={value!r} is no mapping; one name is mapped with {key}.<name>=<name>")
    return value or {}


class Canonical(dict[str, Any]):
    """A row in our columns already, which no mapping applies to."""


@dataclass(frozen=True)
class Layout:
    """A row of the table.

    Args:
        kind: what a row is: "conversation", "single" (a prompt with one response), "rated" (the same with a rating),
            "pair", "ranking", "prompt" or "text".
        needs: columns that must have a value.
        when: what their values must be besides.
        read: returns our columns from the row; None where they are ours already.
        also: columns that are read where a row has them.
    """

    kind: str
    needs: tuple[str, ...]
    when: Callable[[Row], bool] | None = None
    read: Callable[[Row], Row] | None = None
    also: tuple[str, ...] = ()


def read_row(row: Row, columns: Columns, kinds: tuple[str, ...]) -> tuple[Layout | None, Row]:
    """Return the layout of a row among `kinds`, the best first, and the row in our columns; None where none fits.

    Columns that the user maps come before others, our own names before those of a data set, which are tried in the
    order of the table.
    """
    view = columns.view(row)
    present = frozenset(name for name, value in view.items() if has_value(value))
    fitting = (layout for layout in _fitting(present, columns.mapped, kinds) if not layout.when or layout.when(view))
    layout = next(fitting, None)
    if layout is None or layout.read is None:
        return layout, view
    beside = {name: value for name, value in view.items() if name in BESIDE[layout.kind]}
    return layout, beside | layout.read(view)


@lru_cache(maxsize=4096)  # most rows of a data set have the same columns
def _fitting(present: frozenset[str], mapped: frozenset[str], kinds: tuple[str, ...]) -> tuple[Layout, ...]:
    def order(layout: Layout) -> tuple[Any, ...]:
        ours = layout.read is None
        named = len(mapped.intersection(layout.needs))
        return (-named, layout.kind == "text", not ours, kinds.index(layout.kind) if ours else 0)

    return tuple(sorted((x for x in LAYOUTS if x.kind in kinds and present.issuperset(x.needs)), key=order))


def unread_columns(row: Row, columns: Columns, kinds: tuple[str, ...]) -> set[str]:
    """Return the columns of a row that nothing but a reward reads."""
    try:
        view, (layout, _) = columns.view(row), read_row(row, columns, kinds)
    except RowError:  # refused when it is read, or skipped
        return set()
    if layout is None:
        return set()
    read = {*layout.needs, *layout.also, *BESIDE[layout.kind]}
    kept = {name for name in view if name not in read}
    fields = {f"{name}[].{field}" for name in read & view.keys() for field in unread_fields(view[name])}
    return {str(name) for name, value in row.items() if name in kept and has_value(value)} | fields


def has_value(value: Any) -> bool:
    """Return whether a column has a value: an empty field of a CSV file is none."""
    return value is not None and not (isinstance(value, str) and not value)


def listed(row: Row) -> str:
    """Return which columns a row has, for a message."""
    names = [str(name) for name in row]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"the row has {', '.join(names[:20]) or 'nothing'}{more}"


def hint(name: str, row: Row) -> str:
    """Return which column of the row is nearest to `name`, as the end of a message."""
    return nearest(name, row.keys())


# ---- how a layout is read --------------------------------------------------------------------------------------------


def renamed(**names: str) -> Callable[[Row], Row]:
    """Return a reader that takes ours=theirs."""
    return lambda row: {ours: row[theirs] for ours, theirs in names.items()}


def asked(question: str, *more: str, **names: str) -> Callable[[Row], Row]:
    """Return a reader whose prompt is a question and, where the row has them, further texts below it."""

    def read(row: Row) -> Row:
        texts = [need_text(row[question], question)]
        texts += [need_string(row[name], name) for name in more if row.get(name)]
        return {"prompt": "\n\n".join(texts)} | renamed(**names)(row)

    return read


def alpaca(row: Row) -> Row:
    """`history` has earlier turns as pairs of texts."""
    found = asked("instruction", "input", response="output")(row)
    earlier = []
    for number, pair in enumerate(need_list(row.get("history") or [], "history")):
        question, answer = two(pair, f"history[{number}]")
        earlier += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return found | {"prompt": [*earlier, {"role": "user", "content": found["prompt"]}] if earlier else found["prompt"]}


def ranked(prompt: str, column: str, text: str, *scores: str, sign: int = -1) -> Callable[[Row], Row]:
    """Return a reader of a list of objects with a text and a score; `sign` is -1 where a higher score is better."""

    def read(row: Row) -> Row:
        responses, ranking = [], []
        for number, item in enumerate(need_list(row[column], column)):
            place = f"{column}[{number}]"
            found = [item[name] for name in scores if item.get(name) is not None] if isinstance(item, dict) else []
            if not found or text not in item:
                raise RowError(f"{place} is not an object with {text} and {' or '.join(scores)}")
            responses.append(item[text])
            ranking.append(sign * number_of(found[0], f"{place}.{scores[0]}"))
        return {"prompt": row[prompt], "responses": responses, "ranking": ranking}

    return read


def better(prompt: str, first: str, second: str, verdict: str, is_first: Callable[[float], bool | None]) -> Any:
    """Return a reader of two responses and a number that says which is better; `is_first` is None for neither."""

    def read(row: Row) -> Row:
        value = number_of(row[verdict], verdict)
        found = is_first(value)
        if found is None:
            raise RowError(f"{verdict} is {value:g}, so neither response is better")
        chosen, rejected = (first, second) if found else (second, first)
        return {"prompt": row[prompt], "chosen": row[chosen], "rejected": row[rejected]}

    return read


def tldr(row: Row) -> Row:
    """The post as summarization models were asked for it, the chosen of two summaries."""
    info = row["info"] if isinstance(row["info"], dict) else {}
    titles = {"subreddit": "SUBREDDIT: r/", "title": "TITLE: ", "post": "POST: ", "article": "ARTICLE: "}
    parts = [f"{title}{need_string(info[name], f'info.{name}')}" for name, title in titles.items() if info.get(name)]
    if not (info.get("post") or info.get("article")):
        raise RowError("info is not an object with post or article")
    first, second = two(row["summaries"], "summaries")
    texts = [item.get("text") if isinstance(item, dict) else item for item in (first, second)]
    choice = row["choice"]
    if choice not in (0, 1):
        raise RowError(f"choice is {choice!r}, not 0 or 1")
    prompt = "\n\n".join([*parts, "TL;DR:"])
    return {"prompt": prompt, "chosen": texts[int(choice)], "rejected": texts[1 - int(choice)]}


def best_of(row: Row) -> Row:
    """Lists of correct and of incorrect responses, of which each side ties: RewardBench 2."""
    good, bad = (need_list(row[key], key) for key in PAIR)
    return {"prompt": row["prompt"], "responses": [*good, *bad], "ranking": [0] * len(good) + [1] * len(bad)}


def are_texts(value: Any) -> bool:
    """Return whether a value is a list of texts: several responses, where a list of messages is one."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def is_best_of(row: Row) -> bool:
    """Return whether the row has lists of responses as `chosen` and `rejected`."""
    return are_texts(row.get("chosen")) and are_texts(row.get("rejected"))


def two(value: Any, key: str) -> tuple[Any, Any]:
    """Return both items of a list of two."""
    items = need_list(value, key)
    if len(items) != 2:
        raise RowError(f"{key} has {len(items)} items, not two")
    return items[0], items[1]


def number_of(value: Any, key: str) -> float:
    """Return a number, also one that is written as text, or raise a `RowError`."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise RowError(f"{key} is {str(value)[:40]!r}, not a number") from None


def of_binary(first: float) -> Callable[[float], bool | None]:
    """Return a verdict of 0 or 1; `first` is the number of the first response."""
    return lambda value: value == first if value in (0, 1) else None


def of_sign(value: float) -> bool | None:
    """Return the verdict of a scale around 0: below it the first response is better."""
    return value < 0 if value else None


def is_kto(row: Row) -> bool:
    """Return whether a label is one of a single response: true or false, or numbers that may mean that."""
    return str(row["label"]).lower() in ("true", "false", "0", "1", "0.0", "1.0")


def is_nectar(row: Row) -> bool:
    """Return whether `answers` has objects with a rank."""
    answers = row["answers"]
    items = answers if isinstance(answers, list) else [answers]
    return all(isinstance(item, dict) and "rank" in item for item in items)


PAIR = {"chosen": "chosen", "rejected": "rejected"}
LAYOUTS = (
    Layout("conversation", ("messages",)),
    Layout("ranking", ("prompt", "responses", "ranking")),
    Layout("pair", ("prompt", "chosen", "rejected"), lambda row: not is_best_of(row)),
    Layout("rated", ("prompt", "response", "rating")),
    Layout("rated", ("prompt", "completion", "rating")),
    Layout("rated", ("prompt", "completion", "label"), is_kto),
    Layout("rated", ("prompt", "response", "label"), is_kto),
    Layout("single", ("prompt", "response")),
    Layout("single", ("prompt", "completion")),
    Layout("prompt", ("prompt",)),
    Layout("text", ("text",)),
    # of others, in the order in which they are tried
    Layout("ranking", ("prompt", "chosen", "rejected"), is_best_of, best_of),
    Layout("pair", ("conversations", "chosen", "rejected"), read=renamed(prompt="conversations", **PAIR)),
    Layout("pair", ("instruction", "chosen", "rejected"), read=asked("instruction", "input", **PAIR), also=("input",)),
    Layout("pair", ("question", "chosen", "rejected"), read=asked("question", "context", **PAIR), also=("context",)),
    Layout("pair", ("input", "chosen", "rejected"), read=asked("input", **PAIR)),
    Layout("pair", ("info", "summaries", "choice"), read=tldr),
    Layout("pair", ("history", "human_ref_A", "human_ref_B", "labels"),
           read=better("history", "human_ref_A", "human_ref_B", "labels", of_binary(1))),
    Layout("pair", ("prompt", "response_0", "response_1", "better_response_id"),
           read=better("prompt", "response_0", "response_1", "better_response_id", of_binary(0))),
    Layout("pair", ("prompt", "response_1", "response_2", "preference_strength"),
           read=better("prompt", "response_1", "response_2", "preference_strength", of_sign)),
    Layout("pair", ("context", "response1", "response2", "overall_preference"),
           read=better("context", "response1", "response2", "overall_preference", of_sign)),
    Layout("pair", ("chosen", "rejected"), read=renamed(**PAIR)),
    Layout("ranking", ("prompt", "answers"), is_nectar, ranked("prompt", "answers", "answer", "rank", sign=1)),
    Layout("ranking", ("instruction", "completions"),
           read=ranked("instruction", "completions", "response", "overall_score", "fine-grained_score")),
    Layout("rated", ("prompt", "response", "helpfulness"),
           read=renamed(prompt="prompt", response="response", rating="helpfulness")),
    Layout("single", ("instruction", "output"), read=alpaca, also=("input", "history")),
    Layout("single", ("instruction", "response"), read=asked("instruction", "context", "input", response="response"),
           also=("context", "input")),
    Layout("single", ("question", "response"), read=asked("question", "context", response="response"),
           also=("context",)),
    Layout("single", ("question", "answer"), read=asked("question", "context", response="answer"), also=("context",)),
    Layout("single", ("query", "response"), read=asked("query", response="response")),
    Layout("single", ("problem", "solution"), read=asked("problem", response="solution")),
    Layout("single", ("input", "output"), read=asked("input", response="output")),
    Layout("conversation", ("conversations",), read=renamed(messages="conversations")),
    Layout("conversation", ("conversation",), read=renamed(messages="conversation")),
    Layout("prompt", ("instruction",), read=asked("instruction", "input", "context"), also=("input", "context")),
    Layout("prompt", ("question",), read=asked("question", "context"), also=("context",)),
    Layout("prompt", ("query",), read=asked("query")),
    Layout("prompt", ("problem",), read=asked("problem")),
)  # fmt: skip
"""OpenAI and Hugging Face messages, TRL, KTO; ShareGPT, Alpaca, Dolly, OpenOrca, GSM8K, MATH; Anthropic HH, TL;DR, SHP,
SafeRLHF, HelpSteer 1 to 3, Nectar, UltraFeedback, RewardBench 2."""
