"""Conversations have the tokens of `apply_chat_template` in every family of templates, or the reason is told."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.template import JOINED, REWRITTEN, UNCLOSED, Template
from tests.helpers.chat_families import CALL, FAMILIES, RESULT, ROWS, TOOLS, answer, outcome, user, with_template

NO_REASONING = "leaves out the reasoning_content of message 4, role assistant"
NO_TOOLS = {"tool call": "leaves out tools or tool calls: weather", "tool result": "tool"}
# family -> row -> why its tokens differ or it is refused; every other row is equal
DIFFERENT: dict[str, dict[str, str]] = {
    "llama2": {"reasoning": NO_REASONING, **NO_TOOLS},
    "llama3": {"reasoning": NO_REASONING},
    "qwen2_5": {"reasoning": NO_REASONING, "white space": JOINED},
    "qwen3": {},
    # <think> and a newline end the prompt; without reasoning the template writes two newlines, which are one token
    "qwen3_thinking": dict.fromkeys(ROWS, JOINED) | {"inline reasoning": "equal", "reasoning": "equal"},
    "gemma": {"reasoning": NO_REASONING, "system": "System role not supported", **NO_TOOLS},
    "gemma3": {"reasoning": NO_REASONING, **NO_TOOLS},
    "mistral": {"reasoning": NO_REASONING},
    "phi3": {"reasoning": NO_REASONING, **NO_TOOLS},
    "smollm2": {"reasoning": NO_REASONING, "white space": JOINED, **NO_TOOLS},
    "r1_distill": dict.fromkeys(ROWS, UNCLOSED) | NO_TOOLS,
    "glm4": {},
    "harmony": {},
    "olmo2": {"reasoning": NO_REASONING, "white space": JOINED, **NO_TOOLS},
}


WITH_TOOLS = [name for name, rows in DIFFERENT.items() if "tool call" not in rows]


@pytest.mark.slow
@pytest.mark.parametrize("turns", ["last", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_has_the_tokens_of_the_chat_template_or_a_reason(name: str, turns: str) -> None:
    template = Template(with_template(name))
    for row in ROWS:
        found, expected = outcome(template, row, turns), DIFFERENT[name].get(row, "equal")
        assert expected in found, (row, found)
    spelled = [token for token in ("<|im_end|>", "</s>", "<eos>", "<|user|>", "<|end|>") if token in template.control]
    if name != "r1_distill":
        assert (outcome(template, "control text", turns) == "equal") != bool(spelled or name == "harmony")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_for_sampling_is_that_of_the_chat_template(name: str) -> None:
    template = Template(with_template(name))
    for messages in ([user("Hi")], [user(" Hi\n\n"), answer("\nHello "), user("1+1?")]):
        theirs = template.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert template.prompt(messages) == theirs
        assert template.conversation([*messages, answer("2")]).prompt == theirs


LEARNED = {
    "llama2": ["Hello! </s>", "2 </s>"],
    "llama3": ["Hello!<|eot_id|>", "2<|eot_id|>"],
    "qwen2_5": ["Hello!<|im_end|>", "2<|im_end|>"],
    "qwen3": ["Hello!<|im_end|>", "<think>\n\n</think>\n\n2<|im_end|>"],
    "qwen3_thinking": ["Hello!<|im_end|>", "\n</think>\n\n2<|im_end|>"],
    "gemma": ["Hello!<end_of_turn>", "2<end_of_turn>"],
    "gemma3": ["Hello!<end_of_turn>", "2<end_of_turn>"],
    "mistral": ["Hello!</s>", "2</s>"],
    "phi3": ["Hello!<|end|>", "2<|end|>"],
    "smollm2": ["Hello!<|im_end|>", "2<|im_end|>"],
    "r1_distill": ["Hello!<｜end▁of▁sentence｜>", "\n</think>\n\n2<｜end▁of▁sentence｜>"],
    "glm4": ["\n<think></think>\nHello!", "\n<think></think>\n2<|endoftext|>"],
    # <|end|> ends an earlier turn, where sampling does not stop: it is not learned
    "harmony": ["<|channel|>final<|message|>Hello!", "<|channel|>final<|message|>2<|return|>"],
    "olmo2": ["Hello!<|endoftext|>", "2<|endoftext|>"],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_turn_is_learned_with_its_end(name: str) -> None:
    template = Template(with_template(name))
    messages = ROWS["turns"][0]
    _, response, mask, _ = template.conversation(messages, "all")
    runs: list[list[int]] = [[]]
    for token, learned in zip(response, mask, strict=True):
        runs[-1].append(token) if learned else runs.append([])
    decode = template.tokenizer.decode
    assert [decode(run).strip(" ") for run in runs if run] == LEARNED[name]
    assert response[-1] == template.end[-1] in template.eos_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_gives_the_answer_back(name: str) -> None:
    template = Template(with_template(name))
    for text in ("It is 2.", "Add\n\none", "a <div>", "1\n2\n\n\n3"):
        shown = template.decode(template.response(text))
        assert shown.rpartition("</think>")[2].removeprefix("\n\n").removeprefix("\n" if name == "glm4" else "") == text
        assert template.response(shown) == template.response(text)  # a reward folder reads what was sampled


# ---- reasoning -----------------------------------------------------------------------------------------------------


def test_tags_are_tokens_and_earlier_reasoning_is_dropped_as_the_template_does() -> None:
    template = Template(with_template("qwen3"))
    think, tokenizer = template.tokenizer.convert_tokens_to_ids(["<think>", "</think>"]), template.tokenizer
    prompt, response, _, differs = template.conversation(ROWS["inline reasoning"][0])
    assert differs is None
    assert [token for token in response if token in think] == think
    assert not set(think) & set(prompt)
    assert template.decode(response) == "<think>\nAdd one to one.\n</think>\n\n2"
    assert "Add." not in tokenizer.decode(prompt)
    assert template.conversation(ROWS["reasoning"][0]).response == template.response(
        answer("2", reasoning_content="Add."), [user("1+1?")]
    )


def test_the_response_closes_the_reasoning_that_the_prompt_opens() -> None:
    template = Template(with_template("r1_distill"))
    decode = template.tokenizer.decode
    prompt, response, _, differs = template.conversation([user("1+1?"), answer("    2\n")])
    assert decode(prompt).endswith("<｜Assistant｜><think>\n")
    assert (decode(response), differs) == ("\n</think>\n\n    2\n<｜end▁of▁sentence｜>", UNCLOSED)
    for reasoned in (answer("<think>\nAdd.\n</think>\n\n2"), answer("2", reasoning_content="Add.")):
        assert decode(template.response(reasoned)) == "Add.\n</think>\n\n2<｜end▁of▁sentence｜>"
    sampled = template.response("Add.\n</think>\n\n2")  # as a policy answers after that prompt
    assert decode(sampled) == "Add.\n</think>\n\n2<｜end▁of▁sentence｜>"


def test_a_block_that_the_template_writes_in_another_way_is_told() -> None:
    tokenizer = with_template("qwen3_thinking")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}<think></think>"
        "{% endif %}{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    prompt, response, _, differs = Template(tokenizer).conversation([user("Hi"), answer("2")])
    assert tokenizer.decode(prompt + response).endswith("<think>\n</think>2<|im_end|>")
    assert differs == REWRITTEN


def test_a_prompt_that_is_written_anew_once_an_answer_follows_is_told() -> None:
    """The system message is written only before the last message, so the answer loses it."""
    tokenizer = with_template("qwen2_5")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if loop.last and messages[0].role == 'system' and m.role == 'user' %}{{ messages[0].content + ' ' }}"
        "{% endif %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    template = Template(tokenizer)
    messages = [{"role": "system", "content": "Be kind."}, user("Hi"), answer("Hello")]
    prompt, response, _, differs = template.conversation(messages)
    assert tokenizer.decode(prompt) == "<|im_start|>user\nBe kind. Hi<|im_end|><|im_start|>assistant\n"
    assert tokenizer.decode(response) == "Hello<|im_end|>"
    assert differs == REWRITTEN


# ---- which turns are learned ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm2", "llama3", "phi3", "harmony"])
def test_the_assistant_may_open_the_conversation(name: str) -> None:
    template = Template(with_template(name))
    messages = [answer("Hello, I am Mia."), user("Hi"), answer("2")]
    prompt, response, mask, differs = template.conversation(messages, "all")
    learned = template.tokenizer.decode([t for t, counts in zip(response, mask, strict=True) if counts])
    assert differs is None
    assert "Hello, I am Mia." in learned
    assert "Hi" not in learned
    theirs = template.tokenizer.apply_chat_template(messages, return_dict=False)
    assert prompt + response == theirs[: len(prompt + response)]
    alone = template.conversation([answer("Hello, I am Mia.", weight=1), user("Hi"), answer("2", weight=0)], "all")
    assert "Hello, I am Mia." in template.decode(alone.response)
    assert "2" not in template.decode(alone.response)


def learned(template: Template, messages: list[dict[str, Any]], turns: str = "all") -> str:
    _, response, mask, _ = template.conversation(messages, turns)
    return template.tokenizer.decode([token for token, counts in zip(response, mask, strict=True) if counts])


@pytest.mark.parametrize("name", ["qwen2_5", "mistral"])
def test_weights_and_empty_turns_decide_what_is_learned(name: str) -> None:
    template = Template(with_template(name))
    end = template.tokenizer.decode([template.end[-1]])
    talk = [user("Hi"), answer("Hello!"), user("More?"), answer("one"), user("1+1?"), answer("2")]
    assert learned(template, talk).replace(" ", "") == f"Hello!{end}one{end}2{end}"
    talk[1]["weight"], talk[3]["weight"] = 0.0, 1.0
    assert learned(template, talk).replace(" ", "") == f"one{end}2{end}"
    talk[5]["weight"] = 0
    assert learned(template, talk).replace(" ", "") == f"one{end}"
    assert template.conversation(talk, "all").response[-1] == template.end[-1]  # what follows is cut
    with pytest.raises(RowError, match="last assistant message has weight 0"):
        template.conversation(talk)
    talk[3]["content"] = " \n"
    with pytest.raises(RowError, match="no assistant message is learned"):
        template.conversation(talk, "all")
    talk[5]["weight"] = 1
    assert learned(template, talk).replace(" ", "") == f"2{end}"


@pytest.mark.slow
def test_tool_calls_are_learned_and_results_are_not() -> None:
    for name in WITH_TOOLS:
        template = Template(with_template(name))
        messages = [user("The weather?"), CALL, RESULT, answer("It is 21.")]
        _, response, mask, _ = template.conversation(messages, "all", TOOLS)
        text = template.tokenizer.decode([token for token, counts in zip(response, mask, strict=True) if counts])
        assert "weather" in text, name
        assert "Paris" in text, name
        assert "21 degrees" not in text, name
        assert "It is 21." in text, name
        assert template.tokenizer.convert_ids_to_tokens(template.ends)[0] in text


# ---- nothing is left out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "messages", "tools", "reason"),
    [
        ("qwen2_5", [user("Hi"), answer("2", reasoning_content="Add.")], None, "reasoning_content of message 2"),
        (
            "phi3",
            [{"role": "developer", "content": "Be kind."}, user("Hi"), answer("2")],
            None,
            "message 1, role devel",
        ),
        ("smollm2", [user("Hi"), answer("2")], TOOLS, "tools or tool calls: weather"),
        ("phi3", [user("Hi"), CALL | {"content": "2"}], None, "tools or tool calls: weather"),
        (
            "llama3",
            [user("Hi"), CALL | {"tool_calls": CALL["tool_calls"] * 2}],
            None,
            "only supports single tool-calls",
        ),
        ("gemma", [user("Hi"), user("Hi"), answer("2")], None, "Conversation roles must alternate"),
    ],
    ids=["reasoning", "developer", "tools", "tool calls", "two calls", "roles"],
)
def test_what_the_template_does_not_write_is_refused(name: str, messages: Any, tools: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        Template(with_template(name)).conversation(messages, "last", tools)


def test_text_that_the_template_changes_is_not_refused() -> None:
    tokenizer = with_template("qwen2_5")
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content +", "message.content | upper +")
    template = Template(tokenizer)
    assert "HELLO" in tokenizer.decode(template.prompt([user("Hello"), answer("x"), user("hm")]))


def test_of_several_templates_the_one_for_tools_is_used_where_there_are_tools() -> None:
    tokenizer = with_template("qwen2_5")
    tokenizer.chat_template = {"default": with_template("smollm2").chat_template, "tool_use": tokenizer.chat_template}
    template = Template(tokenizer)
    assert "SmolLM" in tokenizer.decode(template.prompt([user("Hi")]))
    with_tools = template.prompt([user("Hi")], TOOLS)
    assert with_tools == tokenizer.apply_chat_template(
        [user("Hi")], tools=TOOLS, add_generation_prompt=True, return_dict=False
    )
    assert template.exported is tokenizer.chat_template


# ---- control text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_no_field_of_a_row_can_write_a_control_token(name: str) -> None:
    template = Template(with_template(name))
    control = template.encoder.control_ids
    attack = "".join(template.control) + " ".join(template.control)

    def count(text: str, tools: Any = None) -> int:
        call = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {text: text}}}
        turns = [user(text), answer(text), user(text), answer("", tool_calls=[call]) if tools else answer(text)]
        prompt, response, _, _ = template.conversation(turns, "last", tools)
        return sum(token in control for token in prompt + response)

    assert count(attack) == count("x")
    schema = {"type": "object", "properties": {attack: {"type": "string", "description": attack}}}
    function = {"name": "weather", "description": attack, "parameters": schema}
    if name in WITH_TOOLS:
        assert count(attack, [{"type": "function", "function": function}]) == count("x", TOOLS)


def test_a_control_token_is_not_made_from_pieces() -> None:
    """Where two messages meet, and where the template's code takes something out between two halves."""
    plain = Template(FAMILIES["smollm2"].tokenizer, "plain")
    stop = plain.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for cut in range(1, 10):
        first, second = "<|im_end|>"[:cut], "<|im_end|>"[cut:]
        prompt, response, _, _ = plain.conversation([user(f"a{first}"), answer(f"{second}b")])
        assert (prompt + response).count(stop) == 1
        assert plain.tokenizer.decode(prompt + response) == "a<|im_end|>b<|im_end|>"
    tokenizer = with_template("qwen2_5")
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content +", "message.content.replace('#', '') +")
    template = Template(tokenizer)
    prompt = template.prompt([user("a<|im_#end|>b<#|im_start|>")])
    honest = template.prompt([user("x")])
    assert [t for t in prompt if t in template.encoder.control_ids] == [
        t for t in honest if t in template.encoder.control_ids
    ]


def test_the_marks_of_control_text_leave_other_text_as_it_is() -> None:
    template = Template(with_template("qwen2_5"))
    for text in ("a<|b", "x <|", "x <", "<<|>>", "<|im_", "if a <|> b", "< \n", "<|im_end", "1 < 2"):
        turns = [user(text), answer(text)]
        prompt, response, _, differs = template.conversation(turns)
        theirs = template.tokenizer.apply_chat_template(turns, return_dict=False)
        assert (prompt + response, differs) == (theirs[: len(prompt + response)], None)
    with pytest.raises(RowError, match="not characters"):
        template.prompt([user("a\ufdd0b")])


def test_newline_tokens_are_text() -> None:
    for name in ("chatml", "human_assistant", "plain", "auto"):
        template = Template(with_template("gemma"), name)
        newline, two = template.tokenizer.convert_tokens_to_ids(["\n", "\n\n"])
        assert not {newline, two} & (template.eos_ids | template.encoder.control_ids)
        ids = template.response("apple\nbanana\n\nThe end.")
        assert {newline, two} < set(ids)
        assert template.decode(ids) == "apple\nbanana\n\nThe end."


# ---- templates of ours ---------------------------------------------------------------------------------------------

TALK = [user("Hi"), answer("Hello!"), user("1+1?"), answer("2")]
WRITTEN = {
    ("chatml", "smollm2"): "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>",
    ("chatml", "gemma"): "<bos><|im_start|>user\nHi<eos>\n<|im_start|>assistant\nHello!<eos>\n"
    "<|im_start|>user\n1+1?<eos>\n<|im_start|>assistant\n2<eos>",
    ("human_assistant", "llama2"): "<s>\n\nHuman: Hi\n\nAssistant: Hello!</s>\n\nHuman: 1+1?\n\nAssistant: 2</s>",
    ("plain", "llama2"): "<s>HiHello!1+1?2</s>",
}


@pytest.mark.parametrize(("name", "family"), WRITTEN)
def test_a_template_of_ours_is_exported_as_it_was_learned(name: str, family: str) -> None:
    tokenizer = FAMILIES[family].tokenizer
    template = Template(tokenizer, name)
    tokenizer.chat_template = template.exported
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == WRITTEN[name, family]
    again = Template(tokenizer)
    for turns in ("last", "all"):
        prompt, response, _, differs = template.conversation(TALK, turns)
        assert differs is None
        assert prompt + response == tokenizer.apply_chat_template(TALK, return_dict=False)
        assert again.conversation(TALK, turns) == template.conversation(TALK, turns)
    assert again.exported == template.exported
    assert again.ends == template.ends
