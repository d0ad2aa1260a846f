"""A model whose weights are read after it is sharded is the model that a whole load returns."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, MixtralConfig, MixtralForCausalLM

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapters import load_model
from rlhf_lightning.models.completion import unwrap
from rlhf_lightning.models.deferred import read_weights
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.tiny import build_tiny
from tests.helpers.models import tiny_config

LORA = {"r": 2, "dropout": 0.1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models with tied and untied embeddings, in one file and in several, and a trained reward model."""
    place = tmp_path_factory.mktemp("deferred")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(rope_theta=500.0)).save_pretrained(place / "tied", max_shard_size="20KB")
    LlamaForCausalLM(tiny_config(tie_word_embeddings=False)).save_pretrained(place / "untied")
    LlamaForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(place / "reward")
    return {name: str(place / name) for name in ("tied", "untied", "reward")}


def plain(model: Any) -> tuple[Any, ...]:
    """Return what of a model decides its result, but its tensors."""
    inner = unwrap(model)
    generation = getattr(inner, "generation_config", None)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return type(inner), inner.config.to_dict(), generation and generation.to_dict(), trainable, model.training


@pytest.mark.parametrize(
    ("name", "load", "lora", "options"),
    [
        ("tied", load_causal_lm, None, {}),
        ("untied", load_causal_lm, None, {"dtype": "bfloat16", "gradient_checkpointing": True, "dropout": 0.1}),
        ("tied", load_causal_lm, LORA, {}),
        ("tied", load_scalar_model, None, {"seed": 3}),
        ("untied", load_scalar_model, LORA, {"seed": 3}),
        ("reward", load_scalar_model, None, {"trained": True}),
    ],
)
def test_it_is_the_model_of_a_whole_load(
    name: str, load: Callable[..., Any], lora: Any, options: dict[str, Any], folders: dict[str, str]
) -> None:
    """Bit-equal weights and buffers, equal configs, and as many random numbers drawn."""
    found = []
    for defer in (False, True):
        torch.manual_seed(7)
        found.append((load_model(lambda: load(folders[name], **options), lora, defer), torch.get_rng_state()))
    (whole, drawn), (model, drawn_as_well) = found
    assert torch.equal(drawn, drawn_as_well)
    without = {n for n, p in model.named_parameters() if p.is_meta}
    assert any("q_proj" in n for n in without)
    assert not any("lora_" in n or "score" in n for n in without)
    read_weights(model, torch.device("cpu"))
    assert plain(model) == plain(whole)
    expected, tensors = whole.state_dict(), model.state_dict()
    assert expected.keys() == tensors.keys()
    for key, value in [*expected.items(), *((k, v) for k, v in whole.named_buffers())]:
        other = tensors[key] if key in tensors else dict(model.named_buffers())[key]
        assert (other.dtype, other.device.type) == (value.dtype, "cpu")
        assert torch.equal(other, value), key


def test_tied_embeddings_stay_tied(folders: dict[str, str]) -> None:
    model = load_model(lambda: load_causal_lm(folders["tied"]), defer=True)
    read_weights(model, torch.device("cpu"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(list(model.parameters())) == len(list(load_causal_lm(folders["tied"]).parameters()))


def rename(folder: Path) -> None:
    """Give a tensor an older name, which transformers knows."""
    file = folder / "model.safetensors"
    save_file({key.removeprefix("model."): value for key, value in load_file(file).items()}, file, {"format": "pt"})


def quantize(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8", "dequantize": True}
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (rename, "its files have 0 tensors for model.embed_tokens.weight"),
        (quantize, "it is quantized"),
        (lambda folder: None, "transformers converts the weights of mixtral"),
    ],
)
def test_what_cannot_be_deferred_is_loaded_whole_and_told(
    change: Callable[[Path], None], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes)) if "mixtral" in reason else LlamaForCausalLM(tiny_config())
    model.save_pretrained(tmp_path)
    change(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = load_model(lambda: load_causal_lm(str(tmp_path)), defer=True)
    assert [record.message for record in caplog.records if "whole before it is sharded" in record.message] == [
        f"every rank loads {tmp_path} whole before it is sharded: {reason}"
    ]
    for key, value in load_causal_lm(str(tmp_path)).state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def test_layers_that_are_copied_are_loaded_whole(folders: dict[str, str]) -> None:
    lora = LORA | {"modules_to_save": ["lm_head"]}
    torch.manual_seed(1)
    whole = load_model(lambda: load_causal_lm(folders["untied"]), lora)
    torch.manual_seed(1)
    model = load_model(lambda: load_causal_lm(folders["untied"]), lora, defer=True)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in whole.state_dict().items())


def test_missing_weights_are_told_as_in_a_whole_load(tmp_path: Path) -> None:
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"is incomplete: its weights lack model.norm.weight"):
        load_model(lambda: load_causal_lm(str(tmp_path)), defer=True)


def test_a_built_model_is_deferred(tmp_path: Path) -> None:
    texts = [f"the cat sat {i} times" for i in range(40)]
    folder = build_tiny(tmp_path / "tiny", texts, vocab_size=300, hidden_size=32, layers=2, heads=2)
    assert any(p.is_meta for p in load_model(lambda: load_causal_lm(str(folder)), defer=True).parameters())
