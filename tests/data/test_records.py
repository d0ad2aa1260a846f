"""Every published layout is understood, and every bad row says what is wrong with it."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_lightning.data.records import RowError, demonstration, preference, prompt

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "Go away"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, BOT]},
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": [USER], "completion": [BOT]},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away"},
    ],
)
def test_demonstrations(row: dict[str, Any]) -> None:
    assert demonstration(row).content == [USER, BOT]


def test_raw_text_and_system_and_input() -> None:
    assert demonstration({"text": "Once."}).content == "Once."
    content = demonstration({"prompt": "Hi", "response": "Hello", "system": "Be kind."}).content
    assert content == [{"role": "system", "content": "Be kind."}, USER, BOT]
    content = demonstration({"instruction": "Add", "input": "1 2", "output": "3"}).content
    assert content[0] == {"role": "user", "content": "Add\n\n1 2"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
        {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]},
        {"chosen": [USER, BOT], "rejected": [USER, OTHER]},
        {"prompt": "Hi", "chosen": [USER, BOT], "rejected": [USER, OTHER]},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Hello", "rejected": "Go away"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away"},
        {"prompt": "Hi", "responses": ["Go away", "Hello"], "ranking": [2, 1]},
    ],
)
def test_preferences(row: dict[str, Any]) -> None:
    found = preference(row)
    assert (found.prompt, found.responses, found.ranks) == ([USER], ["Hello", "Go away"], [0, 1])


def test_rankings_are_sorted_and_ties_share_a_rank() -> None:
    found = preference({"prompt": "Hi", "responses": ["a", "b", "c", "d"], "ranking": [3, 1, 3, 2], "margin": "2"})
    assert found.responses == ["b", "d", "a", "c"]
    assert found.ranks == [0, 1, 2, 2]
    assert found.margin == 2.0


def test_ranks_may_be_fractions_and_the_best_of_a_ranking_is_a_demonstration() -> None:
    row = {"prompt": "Hi", "responses": ["a", "b", "c"], "ranking": [2.5, 1.2, 1.7]}
    assert (preference(row).responses, preference(row).ranks) == (["b", "c", "a"], [0, 1, 2])
    assert demonstration(row).content[-1] == {"role": "assistant", "content": "b"}


def test_rewards_get_every_column_of_the_row_and_the_answer_that_followed_the_prompt() -> None:
    row = {"messages": [USER, BOT, USER | {"content": "More"}, OTHER], "answer": "3"}
    found = prompt(row)
    assert found.text == "More"
    assert found.metadata == {"answer": "3", "messages": row["messages"][:3], "completion": "Go away"}
    for row in (
        {"prompt": "Hi", "chosen": "x", "rejected": "y", "id": 7},
        {"prompt": "Hi", "responses": ["a", "b"], "ranking": [1, 2], "text": "the gold text"},
        {"prompt": "Hi", "completion": "Hello", "label": 0},
        {"question": "Hi", "answer": "2 + 3\n#### 5"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ):
        found = prompt(row)
        gold = {"completion": "Hello"} if "conversations" in row else {}
        assert (found.text, found.metadata) == ("Hi", gold | row | {"messages": [USER]})
    assert prompt({"text": "Once"}).content == "Once"


@pytest.mark.parametrize(
    ("read", "row", "reason"),
    [
        (demonstration, {"mesages": []}, "no messages or prompt or text; the row has mesages. Did you mean 'mesages'"),
        (demonstration, {"messages": [BOT]}, "no user turn"),
        (demonstration, {"messages": [USER]}, "last message is not the assistant's"),
        (demonstration, {"messages": []}, "messages is empty"),
        (demonstration, {"messages": [USER, {"role": "asistant", "content": "x"}]}, "Did you mean 'assistant'"),
        (demonstration, {"messages": [USER, {"role": "assistant"}]}, "not an object with role and content"),
        (demonstration, {"prompt": "Hi"}, "no response or completion"),
        (demonstration, {"prompt": "Hi", "response": "  "}, "response is empty"),
        (demonstration, {"prompt": "Hi", "response": 3}, "response is int, not text"),
        (demonstration, {"prompt": "", "response": "x"}, "prompt is empty"),
        (preference, {"prompt": "Hi", "chosen": "x"}, "no rejected"),
        (preference, {"chosen": "x", "rejected": "y"}, "no prompt"),
        (preference, {"prompt": "Hi", "chosen": "x", "rejected": "x"}, "identical"),
        (preference, {"prompt": "Hi", "chosen": "x", "rejected": " "}, "rejected is empty"),
        (
            preference,
            {"chosen": [USER, BOT], "rejected": [{**USER, "content": "Yo"}, OTHER]},
            "do not share the prompt",
        ),
        (preference, {"prompt": "Hi", "responses": ["a", "b"], "ranking": [1]}, "2 responses but 1 ranks"),
        (preference, {"prompt": "Hi", "responses": ["a", "b"], "ranking": [1, 1]}, "the same rank"),
        (
            preference,
            {"prompt": "Hi", "chosen": "x", "rejected": "y", "margin": "big"},
            "margin is 'big', not a number",
        ),
        (preference, {"prompt": "Hi", "chosen": "x", "rejected": "y", "label": 2}, "outside 0..1"),
        (preference, {"prompt": "Hi", "chosen": "x", "rejected": None}, "rejected is empty (null)"),
        (preference, {"prompt": "Hi", "chosen": "x", "rejected": "x \n"}, "identical"),
        (preference, {"prompt": "Hi", "chosen": "x", "rejected": "y", "margin": "nan"}, "not a finite number"),
        (preference, {"prompt": "Hi", "responses": ["a", "b"], "ranking": ["first", 2]}, "ranking[0] is 'first'"),
        (preference, {"prompt": "Hi", "responses": ["a", "b", "a"], "ranking": [1, 2, 3]}, "identical but ranked"),
        (demonstration, {"prompt": "Hi", "response": "\ud800"}, "lone surrogate"),
        (prompt, {"answer": 3}, "no prompt or messages or text"),
    ],
)
def test_bad_rows_say_what_is_wrong(read: Any, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        read(row)
    assert reason in str(caught.value)
