"""Conversations as data sets write them: nothing in a message or before it is dropped without a word."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf_lightning.data.messages import RowError, read_messages
from rlhf_lightning.data.records import demonstration, learned_turns, preference, prompt

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
MORE, END = {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bye"}
OTHER = {"role": "assistant", "content": "Go away"}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "dog"}}}


# ---- fields ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"role": "human", "content": "Hi"}, USER),
        ({"from": "gpt", "value": "Hello"}, BOT),
        ({"role": "Assistant", "content": "Hello"}, BOT),
        ({"role": "model", "content": "Hello"}, BOT),
        ({"role": "developer", "content": "Be kind."}, {"role": "developer", "content": "Be kind."}),
        ({"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, USER),
        ({"role": "user", "content": ["H", {"text": "i", "image": None}]}, USER),
        (BOT | {"weight": 0}, BOT | {"weight": 0.0}),
        (BOT | {"train": True}, BOT | {"weight": 1.0}),
        (BOT | {"loss": False, "weight": 0.0}, BOT | {"weight": 0.0}),
        (USER | {"weight": 0}, USER),
        (BOT | {"weight": None, "tool_calls": None, "reasoning_content": None}, BOT),
        (BOT | {"reasoning_content": "hm"}, BOT | {"reasoning_content": "hm"}),
        (BOT | {"value": 0.5, "from": 3}, BOT),
        (BOT | {"thinking": "hm"}, BOT | {"reasoning_content": "hm"}),
        (BOT | {"tool_calls": []}, BOT),
        (BOT | {"tool_calls": [CALL]}, BOT | {"tool_calls": [CALL]}),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, BOT | {"content": "", "tool_calls": [CALL]}),
        ({"role": "assistant", "tool_calls": [CALL]}, BOT | {"content": "", "tool_calls": [CALL]}),
        (BOT | {"tool_calls": json.dumps([CALL])}, BOT | {"tool_calls": [CALL]}),
        (BOT | {"tool_calls": [{"name": "find", "arguments": '{"what": "dog"}'}]}, BOT | {"tool_calls": [CALL]}),
        (BOT | {"function_call": CALL["function"]}, BOT | {"tool_calls": [CALL]}),
        (
            {"from": "function_call", "value": '{"name": "find", "arguments": {"what": "dog"}}'},
            BOT | {"content": "", "tool_calls": [CALL]},
        ),
        (
            {"role": "tool", "content": "house", "name": "find", "tool_call_id": "1"},
            {"role": "tool", "content": "house", "name": "find", "tool_call_id": "1"},
        ),
        ({"from": "observation", "value": ""}, {"role": "tool", "content": ""}),
    ],
)
def test_fields_of_a_message(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read_messages([given], "messages") == [expected]
    assert read_messages(given, "messages") == read_messages(json.dumps([given]), "messages") == [expected]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (BOT | {"weight": 0.5}, "messages[0].weight is 0.5, not 0 or 1"),
        (BOT | {"train": "yes"}, "messages[0].train is 'yes', not 0 or 1"),
        (BOT | {"weight": 1, "train": False}, "weight and train disagree"),
        (USER | {"weight": 1}, "only messages of the assistant are learned"),
        (USER | {"tool_calls": [CALL]}, "which only the assistant has; its role is user"),
        (USER | {"content": [{"type": "image_url", "image_url": "x"}]}, "content[0] is a part of type image_url"),
        (BOT | {"tool_calls": [{"function": {"arguments": {}}}]}, "tool_calls[0] is not an object with the name"),
        (BOT | {"tool_calls": [{"name": "f", "arguments": "{"}]}, "tool_calls[0].arguments is not JSON"),
        (BOT | {"tools": "[]"}, "messages[0].tools is not read, the column tools is"),
        (USER | {"images": ["x.png"]}, "messages[0].images is not read"),
        (BOT | {"channel": "analysis"}, "messages[0].channel is not read"),
        (BOT | {"reasoning_content": 3}, "reasoning_content is int, not text"),
        (BOT | {"reasoning_content": "\ud800"}, "reasoning_content contains a lone surrogate"),
        (BOT | {"tool_calls": [{"name": "f", "arguments": {"a": "\udc00"}}]}, "tool_calls contains a lone surrogate"),
        (
            BOT | {"tool_calls": [{"name": "f", "arguments": '{"a":' + "[" * 300 + "]" * 300 + "}"}]},
            "tool_calls[0].arguments has lists or objects nested more than 200 deep",
        ),
        ({"role": "assistant", "content": None}, "is not an object with role and content"),
        ({"role": "critic\n", "content": "x"}, "role is 'critic\\n', not one of"),
        ("hello", "is not an object with role and content"),
    ],
)
def test_what_a_message_cannot_have(message: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        read_messages([message], "messages")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_messages_that_are_almost_json_are_refused() -> None:
    with pytest.raises(RowError, match="begins like messages stored as text, and is no JSON"):
        demonstration({"prompt": "Hi", "response": '[{"role": "assistant", "content": "Hello"'})
    with pytest.raises(RowError, match="begins like messages"):  # as pandas prints arrays
        demonstration({"messages": "[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant', 'content': 'Hello'}]"})
    for text in ("[1, 2]", '{"name": "find"}', "[role]"):
        assert demonstration({"prompt": text, "response": text}).content == [USER | {"content": text},
                                                                            BOT | {"content": text}]  # fmt: skip


def test_tools_are_kept() -> None:
    tool = {"type": "function", "function": {"name": "find"}}
    row = {"messages": [USER, BOT | {"content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "x"}, END]}
    for column in ({"tools": [tool]}, {"tools": json.dumps([tool])}, {"functions": [tool["function"]]}):
        assert demonstration(row | column).tools == prompt(row | column).tools == [tool]
        pair = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"} | column
        assert preference(pair).tools == [tool]
    for empty in (None, "", [], "[]"):
        assert demonstration(row | {"tools": empty}).tools is None
    with pytest.raises(RowError, match="tools is not JSON: 'find'"):
        demonstration(row | {"tools": "find"})
    with pytest.raises(RowError, match="tools is not a list of JSON schemas"):
        demonstration(row | {"tools": ["find"]})


# ---- what is learned -------------------------------------------------------------------------------------------------


def test_messages_say_which_turns_are_learned() -> None:
    plain = [USER, BOT, MORE, END]
    assert [learned_turns(plain, turns) for turns in ("last", "all")] == ["last", "all"]
    for weights, expected in (((0, 1), "last"), ((1, 1), "all"), ((1, 0), "all"), ((None, 1), "all")):
        given = [BOT | {"weight": weights[0]}, END | {"weight": weights[1]}]
        content = demonstration({"messages": [USER, given[0], MORE, given[1]]}).content
        assert learned_turns(content, "last") == learned_turns(content, "all") == expected
    with pytest.raises(RowError, match="every message of the assistant has weight 0"):
        demonstration({"messages": [USER, BOT | {"weight": 0}, MORE, END | {"train": False}]})


def test_of_a_completion_of_several_turns_all_are_learned_and_none_before_it() -> None:
    row = {"prompt": [USER, BOT, MORE], "completion": [END, MORE, BOT]}
    content = demonstration(row).content
    assert isinstance(content, list)
    assert [m.get("weight") for m in content] == [None, 0.0, None, 1.0, None, 1.0]
    assert demonstration({"prompt": [USER], "completion": [BOT]}).content == [USER, BOT]


def test_a_conversation_may_begin_with_the_assistant_and_have_empty_turns_in_the_middle() -> None:
    for turns in ([BOT, USER, END], [USER, BOT | {"content": ""}, MORE, END], [USER, BOT, USER | {"content": ""}, END]):
        assert demonstration({"messages": turns}).content == turns
    for turns, reason in (
        ([USER, BOT, MORE, END | {"content": " "}], "the last assistant message is empty"),
        ([USER | {"content": ""}, BOT], "every user turn is empty"),
    ):
        with pytest.raises(RowError, match=reason):
            demonstration({"messages": turns})
    with pytest.raises(RowError, match="the last user turn is empty"):
        prompt({"messages": [USER, BOT, USER | {"content": " "}]})


# ---- pairs of conversations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, BOT, MORE, END], "rejected": [USER, BOT, MORE, OTHER]},
        {"prompt": "Hi", "chosen": [BOT, MORE, END], "rejected": [BOT, MORE, OTHER]},  # goes on after the prompt
        {"prompt": "Hi", "chosen": [USER, BOT, MORE, END], "rejected": [USER, BOT, MORE, OTHER]},  # repeats it
        {"prompt": [USER, BOT, MORE], "chosen": [USER, BOT, MORE, END], "rejected": [USER, BOT, MORE, OTHER]},
        {"prompt": [USER, BOT, MORE], "chosen": [MORE, END], "rejected": [MORE, OTHER]},  # repeats its last turn
        {"prompt": "And?", "chosen": [USER, BOT, MORE, END], "rejected": [USER, BOT, MORE, OTHER]},  # with turns before
        {"prompt": [USER, BOT, MORE], "chosen": [MORE, END], "rejected": "Go away"},
        {"prompt": " Hi\n", "chosen": [USER, BOT, MORE, END | {"weight": 1}], "rejected": [USER, BOT, MORE, OTHER]},
        {
            "prompt": "And?",
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?\n\nAssistant: Bye",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And?\n\nAssistant: Go away",
        },
    ],
)
def test_the_shared_turns_are_the_prompt(row: dict[str, Any]) -> None:
    found = preference(row)
    assert (found.prompt, found.responses) == ([USER, BOT, MORE], ["Bye", "Go away"])
    kind = {"role": "system", "content": "Be kind."}
    assert preference(row | {"system": "Be kind."}).prompt == [kind, USER, BOT, MORE]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([BOT, MORE, END], [OTHER], "chosen has 3 turns after the shared prompt; a response of one turn is needed"),
        ([BOT, MORE, END], [OTHER, MORE, END], "chosen has 3 turns after"),
        ([BOT], [BOT, MORE, END], "rejected has 3 turns after"),
        ([USER, BOT], [MORE, OTHER], "rejected is a conversation that does not contain the prompt"),
        ([BOT | {"tool_calls": [CALL]}], [OTHER], "chosen has tool_calls"),
        ([BOT], [OTHER | {"reasoning_content": "hm"}], "rejected has reasoning_content"),
        ([BOT, MORE], [OTHER], "chosen does not end with an assistant message"),
    ],
)
def test_what_is_no_pair_of_responses(chosen: Any, rejected: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        preference({"prompt": "Hi", "chosen": chosen, "rejected": rejected})
    assert reason in str(caught.value)


# ---- HH --------------------------------------------------------------------------------------------------------------


def test_text_before_the_first_marker_is_kept() -> None:
    row = {side: f"Human: Hi\n\nAssistant: {text}" for side, text in (("chosen", "Hello"), ("rejected", "Go away"))}
    assert preference(row).prompt == [USER]
    row = {side: f"Be kind.\n\n{text}" for side, text in row.items()}
    assert preference(row).prompt == [{"role": "system", "content": "Be kind."}, USER]
    assert preference(row).responses == ["Hello", "Go away"]
    for text, expected in (
        ("Human: Hi\n\nAssistant:", [USER]),
        ("\n\nHuman: Hi", [USER]),
        ("Be kind.\n\nHuman: Hi\n\nAssistant: ", [{"role": "system", "content": "Be kind."}, USER]),
        ("Human: Hi\n\nAssistant: Hello\n\nHuman: And?", [USER, BOT, MORE]),
    ):
        assert prompt({"prompt": text}).content == expected
    for text in ("Human: a name for us", "Sum up:\n\nHuman: Hi\n\nAssistant: Hello\n\nIn a word."):
        assert prompt({"prompt": text}).content == [{"role": "user", "content": text}]
    with pytest.raises(RowError, match="prompt ends with a message of the assistant"):
        prompt({"prompt": "\n\nHuman: Hi\n\nAssistant: Hello"})
