"""What ends a response: every EOS a model names ends it, and a saved model names what it learned as the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rlhf_lightning.data.template import Template
from rlhf_lightning.generation.answers import answer, start
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.models.adapters import add_lora
from rlhf_lightning.models.ends import eos_ids, set_eos
from rlhf_lightning.models.folder import write_model
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.ops.groups import Group
from tests.helpers.chat_families import FAMILIES, user, with_template
from tests.helpers.models import tiny_config


def says(token: int, vocabulary: int, **config: Any) -> Any:
    """Return a model that says the same token whatever it reads."""
    lm: Any = LlamaForCausalLM(
        tiny_config(vocab_size=vocabulary, tie_word_embeddings=False, bos_token_id=None, pad_token_id=0, **config)
    )
    with torch.no_grad():
        for layer in lm.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        lm.model.embed_tokens.weight.fill_(1.0)
        lm.lm_head.weight.zero_()
        lm.lm_head.weight[token] = 5.0
    return lm.eval()


@pytest.mark.parametrize("place", ["config", "generation_config"])
@pytest.mark.parametrize("adapter", [False, True])
def test_an_eos_of_config_or_generation_config_ends_a_response(place: str, adapter: bool) -> None:
    tokenizer = with_template("qwen2_5")
    template, other = Template(tokenizer), tokenizer.convert_tokens_to_ids("<tool_call>")
    lm = says(other, len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    prompts, trained = [Group(template.prompt([user("Hi")]), [])], add_lora(lm, r=2, alpha=4) if adapter else lm

    def respond() -> tuple[list[int], str, bool]:
        engine = LocalEngine()
        start(engine, trained, template)
        found = answer(engine, template, prompts, max_new_tokens=3, temperature=0)
        return found.token_ids[0], found.texts[0], found.finished[0]

    assert respond() == ([other] * 3, "<tool_call>" * 3, False)
    getattr(lm, place).eos_token_id = [tokenizer.eos_token_id, other]
    assert respond() == ([other], "", True)
    getattr(lm, place).eos_token_id = other
    assert respond() == ([other], "", True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "template", "learned"),
    [
        ("qwen2_5", "auto", "<|im_end|>"),
        ("gemma", "auto", "<end_of_turn>"),
        ("phi3", "auto", "<|end|>"),
        ("glm4", "auto", "<|endoftext|>"),
        ("harmony", "auto", "<|return|>"),
        ("smollm2", "chatml", "<|im_end|>"),
        ("gemma", "chatml", "<eos>"),
        ("r1_distill", "human_assistant", "<｜end▁of▁sentence｜>"),
    ],
)
def test_a_saved_model_stops_where_it_learned_to_stop(tmp_path: Path, name: str, template: str, learned: str) -> None:
    tokenizer = with_template(name)
    if name in ("qwen2_5", "smollm2"):  # as in a base model
        tokenizer.eos_token = "<|endoftext|>"
    written = Template(tokenizer, template)
    end, base = tokenizer.convert_tokens_to_ids(learned), tokenizer.eos_token_id
    assert written.response("Hello!")[-1] == end
    lm = says(end, len(tokenizer), eos_token_id=base)
    lm.generation_config.eos_token_id = [base, 7]
    tokenizer.chat_template = written.exported
    set_eos(lm, tokenizer, written.ends)
    write_model(tmp_path / "model", lm, tokenizer, {})

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert saved.chat_template == written.exported
    for file in ("config.json", "generation_config.json"):
        named = json.loads((tmp_path / "model" / file).read_text())["eos_token_id"]
        assert named[0] == end
        assert {base, 7, end} <= set(named)
    assert eos_ids(model) == {*written.ends, base, 7}
    prompt = torch.tensor([saved.apply_chat_template([user("Hi")], add_generation_prompt=True, return_dict=False)])
    assert model.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :].tolist() == [end]
    again = Template(saved)
    assert again.response("Hello!") == written.response("Hello!")
    if "eos_token" not in str(saved.chat_template):
        assert saved.eos_token == learned
    else:  # the template writes what its author meant by EOS
        assert saved.eos_token_id == base


def test_a_single_end_is_a_number_and_a_reward_model_has_it_too(tmp_path: Path) -> None:
    tokenizer = FAMILIES["smollm2"].tokenizer
    tokenizer.eos_token = "<|endoftext|>"
    template = Template(tokenizer, "chatml")
    lm = says(5, len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    reward = load_scalar_model(str(tmp_path / "lm"))
    set_eos(reward, tokenizer, template.ends)
    assert reward.config.eos_token_id == template.ends
    assert len(template.ends) == 2
    set_eos(lm, with_template("harmony"), [3])
    assert lm.config.eos_token_id[0] == 3
    lm.config.eos_token_id = lm.generation_config.eos_token_id = None
    set_eos(lm, with_template("harmony"), [3])
    assert lm.config.eos_token_id == lm.generation_config.eos_token_id == 3
