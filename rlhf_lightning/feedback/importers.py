"""Rows of labels that other tools write: Label Studio, Chatbot Arena, crowd-kit, and rows with several annotations.

Each reader takes a row and returns its labels, in place of one that is left out the reason. Formats and where they are
described: docs/aggregation.md.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any

from rlhf_lightning.data import records
from rlhf_lightning.data.comparisons import Comparison, ItemLabel, LabeledComparison, digest
from rlhf_lightning.data.layouts import READ, Columns, Row, has_value, listed, number_of
from rlhf_lightning.data.messages import LeftOut, Message, RowError, need_list, need_string, need_text
from rlhf_lightning.errors import nearest

Label = LabeledComparison | ItemLabel
IDS = ("id", "item_id", "comparison_id", "question_id", "task_id")
VERDICTS = {"a": (0, 1), "b": (1, 0), "tie": (0, 0)}
ARENA = {"model_a": (0, 1), "model_b": (1, 0), "tie": (0, 0), "tie (bothbad)": (0, 0)}
QUESTIONS = ("prompt", "question", "instruction", "query")
"""Fields of a task of Label Studio that hold the prompt."""
ANNOTATED = ("response_a", "response_b", "annotations", "task")
SIDES = (("1", "2"), ("a", "b"), ("A", "B"), ("left", "right"), ("0", "1"))
"""How the names of the two texts of a pair end, the left one first."""


OF_A_LABEL = {*READ, *IDS, "system_prompt", "group", "strength", "shown", "seconds", "time", "check", "acceptable"}
OF_A_LABEL -= {"tools", "answer"}
"""Columns that are not kept as metadata of a comparison; tools and the known answer belong to its prompt, and are."""


def metadata(row: Row, others: Collection[str] = ()) -> Row:
    """Return the columns of a row that are about its comparison, without `others` that were read."""
    return {name: value for name, value in row.items() if name not in {*OF_A_LABEL, *others}}


def id_of(row: Row, otherwise: str) -> str:
    """Return the id that a row gives its item, `otherwise` where it gives none."""
    name = next((name for name in IDS if has_value(row.get(name))), None)
    return otherwise if name is None else need_string(str(row[name]), name)


def prompt_messages(value: Any, columns: Columns) -> list[Message]:
    """Return a prompt as messages."""
    return records.prompt_of({"prompt": value}, columns)


def need_annotator(row: Row) -> str:
    """Return who labeled a row, or raise a `RowError`."""
    name = row.get("annotator")
    if not has_value(name) or isinstance(name, dict | list):
        raise RowError(f"there is no annotator; data.columns.annotator=<column> names it; {listed(row)}")
    return need_string(str(name), "annotator")


def one_of(value: Any, key: str, options: Sequence[str]) -> str:
    """Return a value that is one of `options`, or raise a `RowError`."""
    if value not in options:
        raise RowError(f"{key} is {str(value)[:40]!r}, not one of {', '.join(options)}.{nearest(str(value), options)}")
    return str(value)


def number(value: Any, key: str) -> float | None:
    """Return a number of seconds, None where there is none."""
    if not has_value(value):
        return None
    seconds = -1.0 if isinstance(value, bool) else number_of(value, key)  # a CSV file has it as text
    if not 0 <= seconds < float("inf"):
        raise RowError(f"{key} is {str(value)[:40]!r}, not a number of seconds")
    return seconds


# ---- several annotations in a row ------------------------------------------------------------------------------------


def annotated_pair(row: Row, columns: Columns) -> list[Label | LeftOut]:
    """Read two responses and a list of annotations, each with annotator, label (a, b or tie) and strength."""
    prompt = prompt_messages(row["prompt"], columns)
    responses = (need_string(row["response_a"], "response_a"), need_string(row["response_b"], "response_b"))
    rest = metadata(row, ANNOTATED)
    comparison = Comparison(id_of(row, digest(prompt, responses)), prompt, responses, rest)
    labels: list[Label | LeftOut] = []
    for place, given in annotations_of(row):
        label = one_of(given.get("label"), f"{place}.label", tuple(VERDICTS))
        strength = given.get("strength")
        if strength is not None and (strength not in (0, 1, 2, 3) or (strength == 0) != (label == "tie")):
            raise RowError(f"{place}.strength is {strength!r}; it is 0 for a tie, 1 to 3 for a preference")
        asked = [given.get(f"{side}_acceptable") for side in "ab"]
        labels.append(
            LabeledComparison(
                comparison, VERDICTS[label], need_annotator(given), group_of(given), strength and int(strength),
                seconds=number(given.get("seconds"), f"{place}.seconds"),
                acceptable=None if None in asked else tuple(map(bool, asked)),
            )
        )  # fmt: skip
    return labels


def annotated_response(row: Row, columns: Columns) -> list[Label | LeftOut]:
    """Read a response and a list of annotations, each with annotator and label; `labels` lists the allowed ones."""
    allowed = str(row["labels"]).split("|") if has_value(row.get("labels")) else None
    item = id_of(row, digest(prompt_messages(row["prompt"], columns), [need_text(row["response"], "response")]))
    labels: list[Label | LeftOut] = []
    for place, given in annotations_of(row):
        label = need_text(given.get("label"), f"{place}.label")
        if allowed and label not in allowed:
            labels.append(LeftOut(f"the label is not one of {', '.join(allowed)}"))
            continue
        seconds = number(given.get("seconds"), f"{place}.seconds")
        labels.append(ItemLabel(item, label, need_annotator(given), group_of(given), seconds))
    return labels


def annotations_of(row: Row) -> list[tuple[str, Row]]:
    """Return the annotations of a row and what each is called in a message."""
    given = need_list(row["annotations"], "annotations")
    for i, item in enumerate(given):
        if not isinstance(item, dict):
            raise RowError(f"annotations[{i}] is not an object with annotator and label")
    return [(f"annotations[{i}]", item) for i, item in enumerate(given)]


def group_of(row: Row) -> str | None:
    """Return the annotator's group, None where none is given."""
    return need_string(str(row["group"]), "group") if has_value(row.get("group")) else None


# ---- Chatbot Arena ---------------------------------------------------------------------------------------------------


def arena(row: Row, columns: Columns) -> list[Label | LeftOut]:
    """Read a vote of Chatbot Arena; `conversation_a` was shown on the left. Both bad is a tie of unacceptable ones."""
    winner = one_of(row["winner"], "winner", tuple(ARENA))
    pair = {"chosen": row["conversation_a"], "rejected": row["conversation_b"]}
    try:
        prompt, responses = records.pair_of(pair, columns)
    except RowError as error:
        if "turns after the shared prompt" in str(error):
            raise LeftOut("its conversations part before their last turn, so no two responses are compared") from None
        raise RowError(str(error).replace("chosen", "conversation_a").replace("rejected", "conversation_b")) from None
    rest = metadata(row, ("winner", "conversation_a", "conversation_b", "judge", "tstamp"))
    return [
        LabeledComparison(
            Comparison(id_of(row, digest(prompt, responses)), prompt, responses, rest),
            ARENA[winner],
            need_annotator({"annotator": row.get("judge")} | row),
            shown=(0, 1),
            time=None if row.get("tstamp") is None else as_time(row["tstamp"]),
            acceptable=(False, False) if winner == "tie (bothbad)" else None,
        )
    ]


def as_time(seconds: Any) -> str:
    """Return seconds since 1970 as ISO 8601."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat()
    except (TypeError, ValueError, OverflowError, OSError):
        raise RowError(f"tstamp is {str(seconds)[:40]!r}, not seconds since 1970") from None


# ---- Label Studio ----------------------------------------------------------------------------------------------------


def label_studio(row: Row, columns: Columns) -> list[Label | LeftOut]:
    """Read a task of a Label Studio export (JSON): every annotation that was not skipped."""
    labels: list[Label | LeftOut] = []
    for i, given in enumerate(need_list(row["annotations"], "annotations")):
        if not isinstance(given, dict):
            raise RowError(f"annotations[{i}] is not an object")
        if given.get("was_cancelled"):
            labels.append(LeftOut("the annotator skipped it"))
            continue
        results = need_list(given.get("result"), f"annotations[{i}].result")
        found = [r for r in results if isinstance(r, dict) and str(r.get("type")).lower() in ("pairwise", "ranker")]
        if not found:
            labels.append(LeftOut("the annotation has no result of a Pairwise or Ranker tag"))
            continue
        names = str(found[0].get("to_name", "")).split(",") if found[0]["type"].lower() == "pairwise" else []
        verdict = found[0].get("value")
        labels.append(
            studio_label(row["data"], verdict, names, given, given.get("completed_by"), row.get("id"), columns)
        )
    return labels


def label_studio_min(row: Row, columns: Columns) -> list[Label | LeftOut]:
    """Read a row of a Label Studio export in JSON-MIN: one annotation, its result among the columns of the task."""
    name, verdict = next(iter(min_results(row).items()))
    data = {key: value for key, value in row.items() if key not in (name, *MIN_COLUMNS)}
    return [studio_label(data, verdict, [], row, row["annotator"], row.get("id"), columns)]


MIN_COLUMNS = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement")


def min_results(row: Row) -> Row:
    """Return the columns of a JSON-MIN row that hold the result of a Pairwise or a Ranker tag."""
    single = {name: value[0] for name, value in row.items() if isinstance(value, list) and len(value) == 1}
    return {
        name: value for name, value in single.items() if isinstance(value, dict) and {"selected", "ranker"} & set(value)
    }


def studio_label(
    data: Any, verdict: Any, names: list[str], given: Row, annotator: Any, task: Any, columns: Columns
) -> LabeledComparison:
    """Return the label of an annotation of Label Studio.

    Args:
        data: the task's data.
        verdict: the value of its result: `selected` or `ranker`.
        names: tags that a Pairwise result belongs to, which may be called as their data.
        given: what has `lead_time` and `created_at`.
    """
    if not isinstance(data, dict) or not isinstance(verdict, dict):
        raise RowError("data or value of the result is not an object")
    person = annotator.get("email") or annotator.get("id") if isinstance(annotator, dict) else annotator
    if "ranker" in verdict:
        name, responses, ranking = studio_ranking(data, verdict["ranker"])
        used, shown = {name}, None
    else:
        left, right = studio_sides(data, names)
        responses = (need_text(data[left], left), need_text(data[right], right))
        ranking = {"left": (0, 1), "right": (1, 0)}[one_of(verdict.get("selected"), "selected", ("left", "right"))]
        used, shown = {left, right}, (0, 1)
    question = next(
        (name for name in ("prompt", "question", "instruction", "query") if has_value(data.get(name))), None
    )
    if question is None:
        raise RowError(f"the task's data has none of {', '.join(QUESTIONS)}; {listed(data)}")
    prompt = prompt_messages(data[question], columns)
    rest = metadata(data, (*used, question, "annotations"))
    item = str(task) if has_value(task) else digest(prompt, responses)
    return LabeledComparison(
        Comparison(item, prompt, responses, rest), ranking, need_annotator({"annotator": person}), shown=shown,
        seconds=number(given.get("lead_time"), "lead_time"),
        time=str(given["created_at"]) if has_value(given.get("created_at")) else None,
    )  # fmt: skip


def studio_sides(data: Row, names: list[str]) -> tuple[str, str]:
    """Return which fields of a task were on the left and on the right: those named as the tags, or a pair of names."""
    if len(names) == 2 and set(names) <= set(data):
        return names[0], names[1]
    texts = [name for name in data if isinstance(data[name], str)]
    pairs = []
    for left, right in SIDES:
        stems = {name[: -len(left)] for name in texts if name.endswith(left)}
        pairs += [(stem + left, stem + right) for stem in stems if stem + right in texts]
    if len(pairs) != 1:
        found = f"several: {', '.join(map(' and '.join, pairs))}" if pairs else "none"
        raise RowError(
            f"two texts whose names differ as text1 and text2, or response_a and response_b, are needed; {found}"
        )
    return pairs[0]


def studio_ranking(data: Row, given: Any) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """Return the field with the items of a Ranker, their texts, and the rank of each."""
    if isinstance(given, dict):
        buckets = [name for name in given if name != "_"] or list(given)
        if len(buckets) != 1:
            raise RowError(f"the ranker has the buckets {', '.join(map(str, buckets))}; one ranked list is read")
        given = given[buckets[0]]
    order = [str(item) for item in need_list(given, "ranker")]
    for name, items in data.items():
        if isinstance(items, list) and all(isinstance(item, dict) and "id" in item for item in items):
            texts = {str(item["id"]): item.get("body") or item.get("html") or item.get("title") for item in items}
            if sorted(order) == sorted(texts):
                responses = tuple(need_text(text, f"{name}[{key}]") for key, text in texts.items())
                return name, responses, tuple(order.index(key) for key in texts)
    raise RowError(f"no list of items in the task's data has the ids of the ranker: {', '.join(order)[:80]}")


# ---- crowd-kit -------------------------------------------------------------------------------------------------------


def crowd_pairwise(row: Row, columns: Columns) -> list[Label | LeftOut]:
    """Read a row of a pairwise frame of crowd-kit: worker, left, right, and label, which equals one of them."""
    responses = (need_text(row["left"], "left"), need_text(row["right"], "right"))
    label = one_of(row["label"], "label", responses)
    prompt = prompt_messages(row["prompt"], columns) if has_value(row.get("prompt")) else []
    rest = metadata(row, ("left", "right", "worker", "task"))
    item = id_of(row, str(row["task"]) if has_value(row.get("task")) else digest(prompt, responses))
    ranking = (0, 1) if label == responses[0] else (1, 0)
    worker = need_annotator({"annotator": row["worker"]})
    return [LabeledComparison(Comparison(item, prompt, responses, rest), ranking, worker, group_of(row), shown=(0, 1))]


def crowd_labels(row: Row, columns: Columns) -> list[Label | LeftOut]:
    """Read a row of a classification frame of crowd-kit: task, worker, label."""
    worker = need_annotator({"annotator": row["worker"]})
    return [ItemLabel(str(row["task"]), str(row["label"]), worker, group_of(row))]
