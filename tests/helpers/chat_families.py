"""Tokenizers with the added tokens of model families, and chat templates with their traits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.template import SPELLED, Template

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
WORDS = (
    "user\n\nassistant\n\nsystem\n\n"  # two newlines are a token, as in most vocabularies
    "Hi there. Hello! What is 1+1? It is 2.\n\nAdd one to one.\nThe weather in Paris is 21 degrees, user assistant "
    'system model tool think {"name": "weather", "arguments": {"city": "Paris"}}\n<|channel|>analysis final\n</think>\n\n'
) * 3
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
THINK = ("<think>", "</think>")
CALLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Family:
    """A family: its special and other added tokens, BOS, EOS, the kind of its tokenizer, and whether it adds a BOS.

    `kind` is "bytes" (byte-level BPE), "spaces" (sentencepiece) or "prefix" (sentencepiece, a space before every text).
    """

    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    bos: str | None = None
    eos: str = "<|endoftext|>"
    kind: str = "bytes"
    adds_bos: bool = False

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return _tokenizer(self)


FAMILIES = {
    "llama2": Family(("<s>", "</s>"), bos="<s>", adds_bos=True, eos="</s>", kind="prefix"),
    "llama3": Family(
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        bos="<|begin_of_text|>", adds_bos=True, eos="<|eot_id|>",
    ),
    "qwen2_5": Family(CHATML, CALLS, eos="<|im_end|>"),
    "qwen3": Family(CHATML, THINK + CALLS, eos="<|im_end|>"),
    "qwen3_thinking": Family(CHATML, THINK + CALLS, eos="<|im_end|>"),
    "gemma": Family(
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), ("\n", "\n\n", "<table>", "</table>"),
        bos="<bos>", adds_bos=True, eos="<eos>", kind="spaces",
    ),
    "gemma3": Family(
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), ("\n", "\n\n"), bos="<bos>", adds_bos=True, eos="<eos>", kind="spaces"
    ),
    "mistral": Family(
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
         "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        bos="<s>", adds_bos=True, eos="</s>", kind="prefix",
    ),
    "phi3": Family(
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), bos=None, kind="prefix"
    ),
    "smollm2": Family(CHATML, eos="<|im_end|>", bos="<|im_start|>"),
    "r1_distill": Family(
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), ("<｜User｜>", "<｜Assistant｜>", *THINK),
        bos="<｜begin▁of▁sentence｜>", adds_bos=True, eos="<｜end▁of▁sentence｜>",
    ),
    "glm4": Family(
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        (*THINK, *CALLS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "harmony": Family(
        ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>",
         "<|call|>"),
        bos="<|startoftext|>", eos="<|return|>",
    ),
    "olmo2": Family(("<|endoftext|>", "<|pad|>"), bos="<|endoftext|>"),
}  # fmt: skip


@cache
def _backend(kind: str) -> str:
    """Return a small BPE tokenizer of this kind, as JSON."""
    trainer: Any = trainers.BpeTrainer(vocab_size=420, show_progress=False)
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), level])  # type: ignore[assignment]
        backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator([WORDS], trainer)
        return backend.to_str()
    words = Tokenizer(models.BPE())  # sentencepiece merges a word with the space before it
    words.train_from_iterator(["▁" + word for word in WORDS.split()], trainer)
    trained = json.loads(words.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *trained["vocab"]]
    vocab, merges = {piece: i for i, piece in enumerate(pieces)}, [tuple(pair) for pair in trained["merges"]]
    backend = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    space, front = normalizers.Replace(" ", "▁"), [normalizers.Prepend("▁")] * (kind == "prefix")
    backend.normalizer = normalizers.Sequence([*front, space])  # type: ignore[assignment]
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, *[decoders.Strip(" ", 1, 0)] * (kind == "prefix")])  # type: ignore[assignment]
    return backend.to_str()


def _tokenizer(family: Family) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(_backend(family.kind))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in family.special])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in family.added])
    if family.adds_bos:
        bos = (family.bos, backend.token_to_id(family.bos))
        backend.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[bos])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos, clean_up_tokenization_spaces=False
    )


def with_template(name: str) -> Any:
    """Return the tokenizer of a family with its template."""
    tokenizer = FAMILIES[name].tokenizer
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


# ---- conversations -------------------------------------------------------------------------------------------------

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = answer(
    "",
    tool_calls=[
        {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    ],
)
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "21 degrees"}
ROWS: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    "one turn": ([user("What is 1+1?"), answer("It is 2.")], None),
    "turns": ([user("Hi"), answer("Hello!"), user("What is 1+1?"), answer("2")], None),
    "system": ([{"role": "system", "content": "Be kind."}, user("Hi"), answer("Hello!")], None),
    "white space": ([user(" Hi \n"), answer("\n\nHello!  ")], None),
    "newlines": ([user("Hi\n\nthere\n"), answer("Add\none\n\nto one.\n\n")], None),
    "code": ([user("Hi"), answer("    if 1 < 2:\n\treturn '<div>'\n")], None),
    "inline reasoning": (
        [user("Hi"), answer("<think>\nAdd.\n</think>\n\nHello"), user("1+1?"),
         answer("<think>\nAdd one to one.\n</think>\n\n2")],
        None,
    ),
    "reasoning": (
        [user("Hi"), answer("Hello", reasoning_content="Greet."), user("1+1?"), answer("2", reasoning_content="Add.")],
        None,
    ),
    "tool call": ([user("The weather?"), CALL], TOOLS),
    "tool result": ([user("The weather?"), CALL, RESULT, answer("21 degrees.")], TOOLS),
    "control text": (
        [user("Hi <|im_end|></s><eos><|user|><|end|>"), answer("a<|im_end|> b</s><end_of_turn><|return|> <｜User｜>c")],
        None,
    ),
}  # fmt: skip


def outcome(template: Template, row: str, turns: str) -> str:
    """Return "equal", "equal but for control text", or why the tokens of a row differ or it is refused."""
    messages, tools = ROWS[row]
    tokenizer = template.tokenizer
    try:
        prompt, response, _, differs = template.conversation(messages, turns, tools)
    except RowError as error:
        return str(error)
    if differs not in (None, SPELLED):
        return differs
    tokenizer.chat_control_tokens = list(template.control)
    theirs = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, sanitize_control_tokens=True)
    tokenizer.chat_control_tokens = None
    if differs is None:
        assert theirs == tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
    ours = prompt + response
    if len(ours) == len(theirs) + 1:  # a template without an end of turn
        theirs.append(tokenizer.eos_token_id)
    assert ours == theirs[: len(ours)], row
    assert not tokenizer.decode(theirs[len(ours) :], skip_special_tokens=True).strip()  # up to the end of the turn
    return "equal" if differs is None else "equal but for control text"
