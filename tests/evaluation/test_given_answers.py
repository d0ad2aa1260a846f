"""Answers from files: how rows are read, and which places they take beside each other and beside a model's."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_lightning.data.layouts import Columns
from rlhf_lightning.data.sources import read_source
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.given import evaluate_answers, read_answers, slots_of, slots_of_files
from rlhf_lightning.evaluation.policy import Evaluation
from rlhf_lightning.evaluation.win_rates import by_scores


def read(rows: list[Any], **options: Any) -> Any:
    return read_answers(read_source(rows, "val", name="evaluate.answers.x"), **options)[0]


def test_layouts_of_an_answer() -> None:
    found = read([
        {"prompt": "Hi", "response": "Hello.", "reward": 1.0},
        {"instruction": "Hi", "output": "Hello.", "generator": "gpt"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello."},
        {"prompt": "Hi", "response": ""},
        {"instruction": "Hi", "output": " "},
    ])  # fmt: skip
    assert {one.key for one in found} == {found[0].key}
    assert [one.response for one in found] == ["Hello."] * 4 + ["", ""]
    assert found[0].metadata["reward"] == 1.0
    mapped = read([{"q": "Hi", "a": "Hello."}], columns=Columns({"prompt": "q", "response": "a"}))
    assert (mapped[0].key, mapped[0].response) == (found[0].key, "Hello.")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "row 1: chosen is a column of rows with several responses"),
        ({"prompt": "Hi"}, "row 1: there is no response"),
        ({"text": "Hi"}, "row 1: there is a text and no prompt"),
    ],
)
def test_what_is_no_answer_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read([row])
    with pytest.raises(UserError, match=r"has no answers, rows with prompt and response \(1 rows skipped\)"):
        read([row], on_bad_row="skip")
    source = read_source([row, {"prompt": "p", "response": "r"}], "val", name="evaluate.answers.x")
    assert read_answers(source, on_bad_row="skip")[1] == 1


def words(prompts: Any, responses: Any, metadata: Any) -> list[float]:
    """Reward what a row of data says."""
    return [float(text.count(str(row.get("word", "a")))) for text, row in zip(responses, metadata, strict=True)]


def test_files_are_put_beside_each_other_by_prompt() -> None:
    """In any order, the k-th answer to a prompt beside the k-th; what has no counterpart is in no pair."""
    one = read(
        [{"prompt": p, "response": r} for p, r in (("p", "a"), ("q", "aa"), ("p", "aaa"), ("r", "a"), ("p", "a"))]
    )
    two = read([{"prompt": p, "response": r} for p, r in (("q", "a"), ("p", "b"), ("s", "a"), ("p", "aaaa"))])
    slots = slots_of_files([one, two], rows=9)
    models = {}
    for name, answers in (("one", one), ("two", two)):
        models[name], left = evaluate_answers(answers, slots, {"reward": words})
        assert left == 0
    assert models["one"].columns["characters"] == [1.0, 2.0, 3.0, 1.0, 1.0]
    (duel,) = by_scores(models, [("two", "one")])
    # p: b against a, aaaa against aaa; q: a against aa
    assert sorted(zip(duel.outcomes, duel.lengths, strict=True)) == [(0.0, (1, 1)), (0.0, (1, 2)), (1.0, (4, 3))]


def test_only_the_first_prompts_are_compared() -> None:
    one = read([{"prompt": p, "response": "a"} for p in "pqrs"])
    result, left = evaluate_answers(one, slots_of_files([one], rows=3))
    assert (len(result.samples), left) == (3, 1)


def test_beside_a_model_rewards_get_the_row_of_data() -> None:
    samples = [{"prompt": p, "response": "x"} for p in ("p", "p", "q")]
    metadata = [{"word": w, "finished": False} for w in "bcd"]
    model = Evaluation({"reward": [0.0] * 3}, [(0, 0), (4, 0), (5, 0)], [(1,), (1,), (2,)], samples, metadata=metadata)
    rows = [{"prompt": p, "response": "bbcddd"} for p in ("q", "p", "z", "p", "p")]
    result, left = evaluate_answers(read(rows), slots_of(model), {"reward": words})
    assert result.places == [(5, 0), (0, 0), (4, 0)]
    assert result.columns["reward"] == [3.0, 2.0, 1.0]
    assert all(row["finished"] for row in result.metadata)
    assert left == 2
