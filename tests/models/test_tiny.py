"""The tiny model: deterministic, complete or absent, and a plain Hugging Face folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rlhf_lightning.models.tiny import SPECIALS, build_tiny

TEXTS = [f"the {animal} sat on the mat {i} times" for i in range(40) for animal in ("cat", "dog", "owl")]
SMALL: dict[str, Any] = {"vocab_size": 320, "hidden_size": 32, "layers": 2, "heads": 2, "max_length": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny(tmp_path_factory.mktemp("tiny") / "model", TEXTS, **SMALL)


def test_it_opens_with_plain_from_pretrained(folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (model.config.vocab_size, model.config.num_hidden_layers) == (len(tokenizer), 2)
    assert len(tokenizer) <= 320
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 64
    for name in ("pad", "bos", "eos"):
        assert getattr(model.config, f"{name}_token_id") == tokenizer.convert_tokens_to_ids(f"<|{name}|>")
    logits = model(**tokenizer("the cat sat", return_tensors="pt")).logits
    assert logits.isfinite().all()


def test_a_cached_tokenizer_is_the_trained_one_and_its_texts_are_not_read_again(folder: str, tmp_path: Path) -> None:
    first = build_tiny(tmp_path / "first", TEXTS, cache=tmp_path / "cache", **SMALL)

    def unread() -> list[str]:
        raise AssertionError

    second = build_tiny(tmp_path / "second", unread, cache=tmp_path / "cache", **SMALL)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"):
        trained = Path(folder, name).read_bytes()
        assert Path(first, name).read_bytes() == trained
        assert Path(second, name).read_bytes() == trained


def test_special_tokens_are_distinct_single_ids_and_the_template_uses_them(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.encode(special) for special in SPECIALS] == [[i] for i in range(len(SPECIALS))]
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|bos|><|system|>be kind<|eos|><|user|>hi<|eos|><|assistant|>hello<|eos|>"
    text = tokenizer.apply_chat_template(messages[1:2], tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|user|>hi<|eos|><|assistant|>"


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(text=st.text())
def test_any_text_comes_back_from_its_tokens(folder: str, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_same_seed_gives_the_same_bytes_and_leaves_the_global_generator_alone(folder: str, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    again = build_tiny(tmp_path / "again", TEXTS, **SMALL)
    assert torch.equal(before, torch.get_rng_state())
    for file in Path(folder).iterdir():
        assert file.read_bytes() == (Path(again) / file.name).read_bytes(), file.name
    other = build_tiny(tmp_path / "other", TEXTS, **SMALL, seed=1)
    same = {f.name for f in Path(folder).iterdir() if f.read_bytes() == (Path(other) / f.name).read_bytes()}
    assert "tokenizer.json" in same
    assert "model.safetensors" not in same


def test_an_existing_folder_is_kept(folder: str) -> None:
    before = {f.name: f.stat().st_mtime_ns for f in Path(folder).iterdir()}
    assert build_tiny(folder, ["other texts"], **SMALL) == folder
    assert {f.name: f.stat().st_mtime_ns for f in Path(folder).iterdir()} == before


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: LlamaForCausalLM, folder: str) -> None:
        Path(folder, "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        build_tiny(tmp_path / "model", TEXTS, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_losing_a_race_returns_the_folder_of_the_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def late(source: str, target: Path) -> None:
        shutil.copytree(source, target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    folder = build_tiny(tmp_path / "model", TEXTS, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    AutoModelForCausalLM.from_pretrained(folder)
