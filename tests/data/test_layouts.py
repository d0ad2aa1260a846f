"""The layouts that data sets have, columns and roles that are mapped, and what is left to rewards."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_lightning.data.layouts import LAYOUTS, Canonical, Columns, unread_columns
from rlhf_lightning.data.messages import LeftOut, RowError
from rlhf_lightning.data.records import DEMONSTRATIONS, PREFERENCES, PROMPTS, demonstration, preference, prompt
from rlhf_lightning.errors import UserError

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "Go away"}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}

SINGLE: dict[str, dict[str, Any]] = {
    "ShareGPT": {"conversations": [HUMAN, GPT]},
    "ShareGPT, one conversation": {"conversation": [HUMAN, GPT], "id": "7"},
    "Alpaca": {"instruction": "Hi", "input": "", "output": "Hello", "text": "### Instruction: Hi ### Hello"},
    "Dolly": {"instruction": "Hi", "context": "", "response": "Hello", "category": "qa"},
    "OpenOrca": {"system_prompt": "", "question": "Hi", "response": "Hello"},
    "GSM8K": {"question": "Hi", "answer": "Hello"},
    "MetaMath": {"query": "Hi", "response": "Hello"},
    "MATH": {"problem": "Hi", "solution": "Hello"},
    "input and output": {"input": "Hi", "output": "Hello"},
    "KTO": {"prompt": "Hi", "completion": "Hello", "label": True},
    "HelpSteer": {"prompt": "Hi", "response": "Hello", "helpfulness": 3, "verbosity": 1},
    "JSON text": {"messages": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'},
    "JSON in text": {"text": '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]'},
    "printed by Python": {"messages": str([USER, BOT])},
}
PAIRS: dict[str, dict[str, Any]] = {
    "ShareGPT": {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "Go away"}},
    "instruction": {"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "Go away"},
    "question": {"question": "Hi", "chosen": "Hello", "rejected": "Go away"},
    "input": {"input": "Hi", "chosen": "Hello", "rejected": "Go away"},
    "SHP": {"history": "Hi", "human_ref_A": "Go away", "human_ref_B": "Hello", "labels": 0},
    "SafeRLHF": {"prompt": "Hi", "response_0": "Go away", "response_1": "Hello", "better_response_id": 1},
    "HelpSteer2": {"prompt": "Hi", "response_1": "Hello", "response_2": "Go away", "preference_strength": -2},
    "HelpSteer3": {"context": [USER], "response1": "Go away", "response2": "Hello", "overall_preference": 3},
    "Nectar": {"prompt": "\n\nHuman: Hi\n\nAssistant: ", "answers": [
        {"answer": "Go away", "rank": 7.0}, {"answer": "Hello", "rank": 1.0}]},
    "UltraFeedback": {"instruction": "Hi", "models": ["a", "b"], "completions": [
        {"response": "Go away", "overall_score": 2.0}, {"response": "Hello", "overall_score": 7.5}]},
    "UltraFeedback, binarized": {"prompt": "Hi", "chosen": [USER, BOT], "rejected": [USER, OTHER],
                                 "messages": [USER, BOT], "score_chosen": 8.0, "score_rejected": 2.0},
    "JSON text": {"prompt": "Hi", "chosen": '[{"role": "assistant", "content": "Hello"}]',
                  "rejected": "[{'role': 'assistant', 'content': 'Go away'}]"},
}  # fmt: skip


@pytest.mark.parametrize("row", SINGLE.values(), ids=SINGLE)
def test_a_prompt_with_its_response(row: dict[str, Any]) -> None:
    assert demonstration(row).content == [USER, BOT]
    assert prompt(row).content == [USER]


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_pairs_and_rankings(row: dict[str, Any]) -> None:
    found = preference(row)
    assert (found.prompt, found.responses, found.ranks) == ([USER], ["Hello", "Go away"], [0, 1])
    assert demonstration(row).content == [USER, BOT]
    assert prompt(row).content == [USER]


def test_a_verdict_is_read_in_its_direction() -> None:
    for name, column, values in (
        ("SHP", "labels", (1, 0)),
        ("SafeRLHF", "better_response_id", (0, 1)),
        ("HelpSteer2", "preference_strength", (-1, 3)),
        ("HelpSteer3", "overall_preference", (-3, 1)),
    ):
        first, second = (preference(PAIRS[name] | {column: value}).responses for value in values)
        assert first == second[::-1]
    with pytest.raises(RowError, match="preference_strength is 0, so neither response is better"):
        preference(PAIRS["HelpSteer2"] | {"preference_strength": 0})
    with pytest.raises(RowError, match="labels is 2, so neither"):
        preference(PAIRS["SHP"] | {"labels": 2})


def test_summaries_have_the_post_and_its_title() -> None:
    info = {"post": "My dog ran.", "title": "Help", "subreddit": "dogs", "id": "t3"}
    for choice in (0, 1):
        found = preference({"info": info, "summaries": [{"text": "dog ran"}, {"text": "cat"}], "choice": choice})
        expected = "SUBREDDIT: r/dogs\n\nTITLE: Help\n\nPOST: My dog ran.\n\nTL;DR:"
        assert found.prompt == [{"role": "user", "content": expected}]
        assert found.responses[choice] == "dog ran"


def test_texts_below_the_question_belong_to_it() -> None:
    for row in (
        {"instruction": "Who?", "context": "Mia came.", "response": "Mia"},
        {"instruction": "Who?", "input": "Mia came.", "output": "Mia"},
        {"question": "Who?", "context": "Mia came.", "answer": "Mia"},
        {"instruction": "Who?", "input": "Mia came.", "chosen": "Mia", "rejected": "Tom"},
    ):
        assert demonstration(row).content[0]["content"] == prompt(row).text == "Who?\n\nMia came."
    row = {"instruction": "And now?", "output": "Tom", "history": [["Who?", "Mia"]], "system": "Be brief."}
    assert [m["content"] for m in demonstration(row).content] == ["Be brief.", "Who?", "Mia", "And now?", "Tom"]


def test_the_column_system_comes_first_in_every_layout() -> None:
    system = {"role": "system", "content": "Be kind."}
    for row in [*SINGLE.values(), {"prompt": [USER], "completion": [BOT]}]:
        name = "system_prompt" if "system_prompt" in row else "system"
        assert demonstration(row | {name: "Be kind."}).content == [system, USER, BOT]
        assert prompt(row | {name: "Be kind."}).content == [system, USER]
    for row in [*PAIRS.values(), {"prompt": [USER], "chosen": [BOT], "rejected": [OTHER]}]:
        assert preference(row | {"system": "Be kind."}).prompt == [system, USER]
    assert demonstration({"messages": [system, USER, BOT], "system": "Be kind."}).content == [system, USER, BOT]
    with pytest.raises(RowError, match="the column system and the system message of the conversation differ"):
        demonstration({"messages": [system, USER, BOT], "system": "Be brief."})


def test_reasoning_may_be_a_column() -> None:
    row = {"problem": "Hi", "thinking": "hm", "solution": "Hello"}
    assert demonstration(row).content == [USER, BOT]
    content = demonstration(row, Columns({"reasoning_content": "thinking"})).content
    assert content == [USER, BOT | {"reasoning_content": "hm"}]
    with pytest.raises(RowError, match="beside a response with turns or reasoning of its own"):
        demonstration({"prompt": "Hi", "response": [BOT | {"reasoning": "so"}], "reasoning_content": "hm"})


def test_lists_may_be_kept_column_by_column() -> None:
    columns = {"from": ["human", "gpt"], "value": ["Hi", "Hello"]}
    assert demonstration({"conversations": columns}).content == [USER, BOT]
    answers = {"answer": ["Go away", "Hello"], "rank": [2.0, 1.0]}
    assert preference({"prompt": "Hi", "answers": answers}).responses == ["Hello", "Go away"]


def test_every_layout_is_read_by_some_stage() -> None:
    for layout in LAYOUTS:
        assert layout.kind in {*DEMONSTRATIONS, *PREFERENCES, *PROMPTS}


# ---- the user's names ------------------------------------------------------------------------------------------------


def test_columns_are_mapped_before_a_layout_is_looked_for() -> None:
    columns = Columns({"prompt": "ask", "response": "say"})
    row = {"ask": "Hi", "say": "Hello", "messages": [OTHER], "prompt": "other", "id": 3}
    assert demonstration(row, columns).content == [USER, BOT]
    assert prompt(row, columns).metadata == row | {"messages": [USER], "response": "Hello"}
    swapped = Columns({"chosen": "rejected", "rejected": "chosen"})
    pair = {"prompt": "Hi", "chosen": "Go away", "rejected": "Hello"}
    assert preference(pair, swapped).responses == ["Hello", "Go away"]
    assert prompt({"prompt": "Hi", "gold": "3"}, Columns({"answer": "gold"})).metadata["answer"] == "3"
    assert demonstration({"prompt": "Hi", "response": "Hello", "messages": []}, Columns({"messages": None})).content
    with pytest.raises(RowError, match=r"data\.columns\.prompt=asc: there is no asc; the row has ask.* Did you mean"):
        demonstration({"ask": "Hi"}, Columns({"prompt": "asc"}))
    with pytest.raises(UserError, match=r"data\.columns\.promt is not one of .* Did you mean 'prompt'"):
        Columns({"promt": "ask"})
    for mapping, key in (("ask", "columns"), ({"role": "bot"}, r"columns\.role")):
        with pytest.raises(UserError, match=rf"data\.{key}='...' is no mapping"):
            Columns(mapping)  # type: ignore[arg-type]


def test_roles_are_mapped() -> None:
    turns = [{"role": "person", "content": "Hi"}, {"role": "bot", "content": "Hello"}]
    with pytest.raises(RowError, match=r"messages\[0\]\.role is 'person'.*data\.columns\.role\.person=<role>"):
        demonstration({"messages": turns})
    columns = Columns({"role": {"person": "user", "bot": "assistant"}})
    assert demonstration({"messages": turns}, columns).content == [USER, BOT]
    with pytest.raises(UserError, match=r"data\.columns\.role\.bot='asistant' .* Did you mean 'assistant'"):
        Columns({"role": {"bot": "asistant"}})


def test_columns_that_nobody_reads_are_named() -> None:
    plain = Columns()
    row = {"prompt": "Hi", "response": "Hello", "system": "Be kind.", "source": "x", "text": "Once", "empty": None}
    assert unread_columns(row, plain, DEMONSTRATIONS) == {"source", "text"}
    assert unread_columns(PAIRS["UltraFeedback"], plain, PREFERENCES) == {"models"}
    assert unread_columns({"ask": "Hi", "id": 1}, Columns({"prompt": "ask"}), PROMPTS) == {"id"}
    assert unread_columns({"text": "Once", "system": "Be kind.", "label": 3}, plain, DEMONSTRATIONS) == {
        "system",
        "label",
    }
    row = {"messages": [USER, BOT | {"timestamp": 3, "weight": 1}], "tools": []}
    assert unread_columns(row, plain, DEMONSTRATIONS) == {"messages[].timestamp"}


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [0, 0.0, False, "0"])
def test_a_label_that_would_turn_a_pair_around_is_refused_unless_it_is_named(label: Any) -> None:
    row = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away", "label": label}
    with pytest.raises(RowError, match=r"chosen would be the worse one: data\.columns\.label=label .*label=null"):
        preference(row)
    assert preference(row, Columns({"label": "label"})).label == 0
    assert preference(row, Columns({"label": None})).label == 1
    assert preference(row | {"label": 0.25}).label == 0.25
    assert preference(row | {"label": 1}).label == 1


def test_sft_learns_what_is_labelled_true_and_leaves_out_the_rest() -> None:
    row = {"prompt": "Hi", "completion": "Hello", "label": True}
    assert demonstration(row).content == demonstration(row | {"label": "True"}).content == [USER, BOT]
    for label in (False, "false"):
        with pytest.raises(LeftOut, match="it is labelled false"):
            demonstration(row | {"label": label})
    for label in (0, 1, "1"):
        with pytest.raises(RowError, match=r"label is .* beside a single response: data\.columns\.label=label"):
            demonstration(row | {"label": label})
    named = Columns({"label": "label"})
    assert demonstration(row | {"label": 1}, named).content == [USER, BOT]
    with pytest.raises(LeftOut):
        demonstration(row | {"label": 0}, named)
    assert demonstration(row | {"label": "positive"}).content == [USER, BOT]  # a class: metadata
    with pytest.raises(RowError, match="is rated True, and no row with the same prompt is rated otherwise"):
        preference(row)


def test_a_row_in_our_columns_is_not_mapped_again() -> None:
    row = Canonical(prompt="Hi", responses=["Hello", "Go away"], ranking=[1, 2])
    assert preference(row, Columns({"prompt": "ask", "rating": "stars"})).responses == ["Hello", "Go away"]
