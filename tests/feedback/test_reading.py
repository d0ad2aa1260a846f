"""Labels are read from our rows and those of others, aligned by text, and a wrong row is named."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_lightning.data.comparisons import Comparison, LabeledComparison
from rlhf_lightning.data.layouts import Columns
from rlhf_lightning.data.messages import RowError
from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.aggregation import aggregate
from rlhf_lightning.feedback.agreement import agreement
from rlhf_lightning.feedback.exports import crowd_frame, data_card
from rlhf_lightning.feedback.reading import labels_of, read_labels

PROMPT = [{"role": "user", "content": "Name a fruit."}]
PLAIN = Columns()


def row(**more: Any) -> dict[str, Any]:
    return {"id": "1", "prompt": PROMPT, "responses": ["apple", "stone"], "ranking": [0, 1], "annotator": "ann"} | more


def studio(result: dict[str, Any], data: dict[str, Any], **more: Any) -> dict[str, Any]:
    annotation = {
        "id": 7,
        "result": [result],
        "was_cancelled": False,
        "lead_time": 4.5,
        "completed_by": 10,
        "created_at": "2021-03-09T22:16:08Z",
    }
    return {"id": 3, "data": data, "annotations": [annotation | more]}


PAIRWISE = {"from_name": "pw", "to_name": "answer1,answer2", "type": "pairwise", "value": {"selected": "right"}}
RANKER = {"from_name": "rank", "to_name": "results", "type": "ranker", "value": {"ranker": ["mdn", "wiki", "blog"]}}
ITEMS = [
    {"id": "blog", "title": "t", "body": "a blog"},
    {"id": "mdn", "body": "the reference"},
    {"id": "wiki", "body": "an article"},
]
TURNS = [{"role": "user", "content": "Hi"}]


def arena(winner: str, **more: Any) -> dict[str, Any]:
    said = {"a": "Hello!", "b": "Go away."}
    conversations = {
        f"conversation_{side}": [*TURNS, {"role": "assistant", "content": text}] for side, text in said.items()
    }
    return {
        "question_id": "q1",
        "model_a": "m",
        "model_b": "n",
        "winner": winner,
        "judge": "arena_user_1",
        "tstamp": 1682351591.1,
        **conversations,
    } | more


def only(given: Any) -> LabeledComparison:
    (label,) = labels_of(given, PLAIN)[1]
    assert isinstance(label, LabeledComparison)
    return label


def test_a_label_is_read_as_it_was_written() -> None:
    comparison = Comparison("1", PROMPT, ("apple", "stone", "pear"), {"topic": "food"})
    label = LabeledComparison(
        comparison,
        (1, 2, 0),
        "ann",
        "g",
        shown=(2, 0, 1),
        seconds=3.5,
        time="2026-01-01T00:00:00Z",
        check=2,
        acceptable=(True, False, True),
    )
    assert only(json.loads(json.dumps(label.row()))) == label
    pair = LabeledComparison(Comparison("2", PROMPT, ("apple", "stone")), (0, 0), "ann", strength=0)
    assert only(pair.row()) == pair  # a tie of all is no bad row


@pytest.mark.parametrize(
    ("given", "layout", "responses", "ranking"),
    [
        (row(), "labels", ("apple", "stone"), (0, 1)),
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": "Go.", "annotator": 4}, "preferences", ("Hello!", "Go."), (0, 1)),
        ({"prompt": "Hi", "response_0": "a", "response_1": "b", "better_response_id": 1, "annotator": "x"}, "preferences", ("a", "b"), (1, 0)),
        (studio(PAIRWISE, {"prompt": "Hi", "answer1": "one", "answer2": "two"}), "Label Studio JSON", ("one", "two"), (1, 0)),
        (studio(PAIRWISE, {"prompt": "Hi", "textA": "one", "textB": "two"}), "Label Studio JSON", ("one", "two"), (1, 0)),
        (studio(RANKER, {"prompt": "Hi", "items": ITEMS}), "Label Studio JSON", ("a blog", "the reference", "an article"), (2, 0, 1)),
        (
            {"id": 3, "prompt": "Hi", "answer1": "one", "answer2": "two", "pw": [{"selected": "left"}], "annotator": 1, "annotation_id": 9, "created_at": "", "updated_at": "", "lead_time": 2.0},
            "Label Studio JSON-MIN", ("one", "two"), (0, 1),
        ),
        (arena("model_b"), "Chatbot Arena votes", ("Hello!", "Go away."), (1, 0)),
        (arena("tie (bothbad)"), "Chatbot Arena votes", ("Hello!", "Go away."), (0, 0)),
        ({"worker": "w", "left": "x", "right": "y", "label": "y"}, "crowd-kit pairwise", ("x", "y"), (1, 0)),
    ],
)  # fmt: skip
def test_layouts_are_recognized(given: Any, layout: str, responses: tuple[str, ...], ranking: tuple[int, ...]) -> None:
    assert labels_of(given, PLAIN)[0] == layout
    label = only(given)
    assert dict(zip(label.comparison.responses, label.ranking, strict=True)) == dict(
        zip(responses, ranking, strict=True)
    )
    assert label.annotator


def test_what_other_tools_know_is_kept() -> None:
    label = only(studio(PAIRWISE, {"prompt": "Hi", "answer1": "one", "answer2": "two", "topic": "x"}))
    assert (label.seconds, label.shown, label.annotator, label.comparison.id) == (4.5, (0, 1), "10", "3")
    assert label.comparison.metadata == {"topic": "x"}
    vote = only(arena("tie (bothbad)"))
    assert vote.acceptable == (False, False)
    assert vote.time == "2023-04-24T15:53:11.100000+00:00"
    assert vote.comparison.metadata == {"model_a": "m", "model_b": "n"}


def test_annotations_in_a_row() -> None:
    given = {
        "item_id": "p", "task": "pairwise", "prompt": PROMPT, "response_a": "x", "response_b": "",
        "annotations": [{"annotator": "k", "label": "b", "strength": 2, "a_acceptable": True, "b_acceptable": False}, {"annotator": "l", "label": "tie"}],
    }  # fmt: skip
    labels = read_labels([given])
    assert [(x.annotator, x.ranking, x.strength, x.acceptable) for x in labels.comparisons] == [
        ("k", (1, 0), 2, (True, False)),
        ("l", (0, 0), None, None),
    ]
    nominal = {
        "item_id": "r",
        "labels": "yes|no",
        "prompt": "Hi",
        "response": "x",
        "annotations": [{"annotator": "k", "label": "yes"}, {"annotator": "l", "label": "maybe"}],
    }
    labels = read_labels([nominal])
    assert [(x.id, x.label, x.annotator) for x in labels.items] == [("r", "yes", "k")]
    assert labels.left_out == {"the label is not one of yes, no": 1}


def test_swapped_responses_are_aligned_by_text() -> None:
    """Without an id, a comparison is its prompt and the set of its responses, however a row lists them."""
    first = {"prompt": "Hi", "chosen": "a b", "rejected": "c", "annotator": "x"}
    second = {"prompt": "Hi", "chosen": "c", "rejected": "a b ", "annotator": "y"}
    one, other = read_labels([first, second]).comparisons
    assert one.comparison == other.comparison
    assert one.value == -other.value != 0
    ranked = row(
        responses=["stone", "apple"], ranking=[1, 0], shown=[1, 0], check=1, acceptable=[False, True], annotator="bob"
    )
    label = read_labels([row(), ranked]).comparisons[1]
    assert label.comparison.responses == ("apple", "stone")
    assert (label.ranking, label.shown, label.check, label.acceptable) == ((0, 1), (0, 1), 0, (True, False))


def test_the_order_of_a_preference_row_does_not_say_who_is_first() -> None:
    """If the chosen response came first, every first annotator would say "the first one", and chance agreement be wrong."""
    pairs = [
        read_labels([{"prompt": "Hi", "chosen": f"c{i}", "rejected": f"r{i}", "annotator": "x"}]) for i in range(40)
    ]
    assert 8 < sum(label.value == -1 for labels in pairs for label in labels.comparisons) < 32


def test_the_last_of_an_annotators_labels_counts() -> None:
    labels = read_labels([row(), row(annotator="bob"), row(ranking=[1, 0])])
    assert {x.annotator: x.ranking for x in labels.comparisons} == {"ann": (1, 0), "bob": (0, 1)}
    assert labels.left_out == {"an earlier label of the same annotator for the same item": 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (row(annotator=None), "row 1: there is no annotator; data.columns.annotator=<column>"),
        (row(ranking=[0]), "row 1: 2 responses but 1 ranks"),
        (row(shown=[0, 0]), "row 1: shown is .* not an order of the 2 responses"),
        (row(check=2), "row 1: check is 2, not the index of one of 2"),
        (row(strength=4), "row 1: strength is '4'; it is 0 for a tie"),
        (row(seconds="fast"), "row 1: seconds is 'fast', not a number"),
        (row(acceptable=[True]), "row 1: acceptable is .* for each response"),
        ({"worker": "w", "left": "x", "right": "y", "label": "z"}, "row 1: label is 'z', not one of x, y"),
        (arena("model_c"), "row 1: winner is 'model_c', not one of .* Did you mean 'model_"),
        (studio(PAIRWISE, {"prompt": "Hi", "a": "x", "other": "y"}), "row 1: two texts whose names differ .* none"),
        (
            studio(PAIRWISE, {"q": "Hi", "answer1": "x", "answer2": "y"}),
            "row 1: the task's data has none of prompt, question",
        ),
        (
            studio(RANKER | {"value": {"ranker": {"good": ["a"], "bad": ["b"]}}}, {"prompt": "Hi", "items": ITEMS}),
            "the buckets good, bad",
        ),
        ({"text": "x"}, "row 1: no layout of labels has its columns: the row has text"),
    ],
)
def test_a_wrong_row_is_named(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_labels([given])
    assert len(read_labels([given, row()], on_bad_row="skip")) == 1


def test_another_comparison_with_the_same_id_is_refused() -> None:
    with pytest.raises(UserError, match="row 2: the comparison '1' has other responses"):
        read_labels([row(), row(responses=["apple", "pebble"], annotator="bob")])


def test_annotations_that_say_nothing_are_counted() -> None:
    """Skipped in Label Studio, or a vote on conversations that part early: no bad rows."""
    early = arena(
        "model_a",
        conversation_b=[
            *TURNS,
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": "y"},
            {"role": "assistant", "content": "z"},
        ],
    )
    labels = read_labels(
        [
            row(),
            studio(PAIRWISE, {}, was_cancelled=True),
            studio(PAIRWISE, {}) | {"annotations": [{"id": 1, "result": []}]},
            early,
        ]
    )
    assert len(labels) == 1
    assert sorted(labels.left_out.values()) == [1, 1, 1]
    with pytest.raises(UserError, match="has no label .1 rows: the annotator skipped it"):
        read_labels([studio(PAIRWISE, {}, was_cancelled=True)])


def test_files_and_frames(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        [{"task": "t1", "worker": "w1", "label": "cat"}, {"task": "t1", "worker": "w2", "label": "dog"}]
    )
    frame.to_csv(tmp_path / "labels.csv", index=False)
    for source in (frame, tmp_path / "labels.csv"):
        assert [(x.id, x.annotator, x.label) for x in read_labels(source).items] == [
            ("t1", "w1", "cat"),
            ("t1", "w2", "dog"),
        ]
    (tmp_path / "ours.csv").write_text(
        'prompt,responses,ranking,annotator,seconds,strength\nHi,"[""a"", ""b""]","[1, 0]",ann,2.5,3\n'
    )
    (label,) = read_labels(tmp_path / "ours.csv").comparisons
    assert (label.ranking, label.seconds, label.strength) == ((1, 0), 2.5, 3)
    (tmp_path / "export.json").write_text(
        json.dumps([studio(PAIRWISE, {"prompt": "Hi", "answer1": "one", "answer2": "two"})])
    )
    assert len(read_labels(str(tmp_path / "export.json"))) == 1
    with pytest.raises(RowError, match="rater: there is no rater"):
        labels_of(row(), Columns({"annotator": "rater"}))
    assert read_labels([row(annotator=None, rater="r")], {"annotator": "rater"}).comparisons[0].annotator == "r"


VALID: list[dict[str, Any]] = [
    row(group="g", strength=2, shown=[1, 0], seconds=2.0, time="2026-01-01", check=0, acceptable=[True, True]),
    {"prompt": "Hi", "chosen": "a", "rejected": "b", "annotator": "x"},
    studio(PAIRWISE, {"prompt": "Hi", "answer1": "one", "answer2": "two"}),
    studio(RANKER, {"prompt": "Hi", "items": ITEMS}),
    {"id": 3, "prompt": "Hi", "answer1": "one", "answer2": "two", "pw": [{"selected": "left"}], "annotator": 1, "annotation_id": 9, "lead_time": 2.0},
    arena("tie"),
    {"item_id": "p", "prompt": "Hi", "response_a": "x", "response_b": "y", "annotations": [{"annotator": "k", "label": "b", "strength": 2}]},
    {"worker": "w", "left": "x", "right": "y", "label": "y", "prompt": "Hi"},
]  # fmt: skip
ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["\ud800", 1e300, -1, "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "role", "content", "label", "result", "value"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_row_of_anything_is_read_or_refused(data: st.DataObject) -> None:
    """One value of a good row is replaced, at any depth: it gives labels that can be used, or a UserError."""
    changed = copy.deepcopy(data.draw(st.sampled_from(VALID)))
    node: Any = changed
    while True:
        key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))))
        if not (isinstance(node[key], dict | list) and node[key]) or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(ANY)
    with suppress(UserError):
        labels = read_labels([changed, *VALID[:1]], on_bad_row="skip")
        agreement(labels, bootstrap=0, reliability=())
        for method in ("none", "soft"):
            result = aggregate(labels, method)
            data_card(result, "x").encode()
            crowd_frame(result.labels.comparisons)
            json.dumps(result.rows)
