"""What is exported of a LoRA model is the trained model: merged, or as an adapter that every stage can start from."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from rlhf_lightning import DPO, SFT, DemonstrationData, PreferenceData, RewardModel
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapters import Adapter, add_lora, export_lora
from rlhf_lightning.models.folder import hash_weights, write_model
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer, resolve_model
from rlhf_lightning.rewards.folder import FolderReward
from tests.helpers.lightning import quiet_lightning
from tests.helpers.models import tiny_config
from tests.modules.offline import adam, demonstrations, fit, preferences, start

# plain peft, which these tests compare with, gives its advice
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore:.*tie_word_embeddings=True.*"
)
TARGETS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole norm": {"target_modules": ["v_proj"], "modules_to_save": ["norm"]},
}


def base(folder: Path, tied: bool = True) -> str:
    """Write a decoder and return its folder; `tied` when embedding and head share their weights."""
    place = start(folder)
    if not tied:
        model = AutoModelForCausalLM.from_pretrained(place)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
        model.save_pretrained(place)
    return place


def held_out(tokenizer: Any, cache: Path) -> DemonstrationData:
    return DemonstrationData(tokenizer, demonstrations(8), demonstrations(16)[8:], batch_size=8, cache_dir=cache)


def loss_of(model: Any, data: DemonstrationData) -> float:
    """Return the held-out loss of a model."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (metrics,) = trainer.validate(SFT(lambda: model, adam(0.0)), data, verbose=False)
    return metrics["val/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", TARGETS)
@quiet_lightning
def test_the_exported_model_has_the_held_out_loss_of_the_trained_one(target: str, tied: bool, tmp_path: Path) -> None:
    """Tied weights are the case that a plain merge gets wrong: LoRA on one of two layers would change both."""
    folder, cache = base(tmp_path, tied), tmp_path / "cache"
    tokenizer = load_tokenizer(folder)
    untrained = loss_of(load_causal_lm(folder), held_out(tokenizer, cache))
    module = SFT(partial(load_causal_lm, folder), adam(0.05), lora={"r": 4, "export": "adapter"} | TARGETS[target])
    trained = fit(module, held_out(tokenizer, cache), 6).callback_metrics["val/loss"].item()
    assert abs(trained - untrained) > 0.01  # the adapter has an effect
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    with torch.no_grad():
        ours = module.trained_model().eval()(input_ids=ids).logits
    # of one training, both exports
    adapter = module.export_model()
    write_model(tmp_path / "adapter", adapter, tokenizer, {})
    adapter.model.adapter_export = "merged"
    write_model(tmp_path / "merged", export_lora(adapter.model), tokenizer, {})
    others: dict[str, Any] = {"adapter": AutoPeftModelForCausalLM, "merged": AutoModelForCausalLM}
    for name, other in others.items():
        assert (tmp_path / name / "adapter_config.json").is_file() is (name == "adapter")
        opened = load_causal_lm(resolve_model(str(tmp_path / name), tmp_path))
        assert loss_of(opened, held_out(tokenizer, cache)) == pytest.approx(trained, abs=1e-5)
        with torch.no_grad():  # what others make of the folder
            theirs = other.from_pretrained(tmp_path / name).eval()(input_ids=ids).logits
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)


def disturb(model: Any, std: float = 0.1) -> Any:
    """Give every weight that is trained an effect far above rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[1, 5, 6, 7, 8]])).logits


def test_half_precision_exports_the_adapter_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = base(tmp_path)
    model = disturb(add_lora(load_causal_lm(folder, dtype="bfloat16")), 0.01)
    exported = export_lora(model)
    assert isinstance(exported, Adapter)
    assert "the adapter is exported, not merged weights: merging into weights of bfloat16" in caplog.text
    write_model(tmp_path / "model", exported, load_tokenizer(folder), {})
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert torch.equal(logits(theirs), logits(model))


def test_a_layer_that_does_not_merge_is_exported_as_an_adapter(
    tiny_lm: LlamaForCausalLM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by comparing outputs, not by a list of layers."""
    monkeypatch.setattr("rlhf_lightning.models.adapters.merge_lora", lambda model: model.get_base_model())
    model = disturb(add_lora(tiny_lm))
    monkeypatch.setattr(model, "get_base_model", lambda: LlamaForCausalLM(tiny_config()))
    assert isinstance(export_lora(model), Adapter)
    assert "its outputs differ by" in caplog.text


@pytest.mark.slow
@quiet_lightning
def test_a_reward_models_adapter_keeps_head_and_normalization(tmp_path: Path) -> None:
    folder = base(tmp_path)
    tokenizer = load_tokenizer(folder)
    data = PreferenceData(tokenizer, preferences(), batch_size=16, cache_dir=tmp_path / "cache")
    module = RewardModel(partial(load_scalar_model, folder), adam(0.01), lora={"export": "adapter"})
    torch.manual_seed(0)
    fit(module, data, 3)
    write_model(tmp_path / "rm", module.export_model(), tokenizer, {})
    asked = (["name red"] * 2, ["blue gold", "blue pink"], [{}, {}])
    merged = RewardModel(partial(load_scalar_model, folder), adam(0.01), lora={})
    torch.manual_seed(0)
    fit(merged, data, 3)
    write_model(tmp_path / "merged", merged.export_model(), tokenizer, {})
    found = FolderReward(str(tmp_path / "rm"))(*asked)
    assert found[0] != found[1]
    torch.testing.assert_close(found, FolderReward(str(tmp_path / "merged"))(*asked), rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    assert config["reward_std"] != 1.0
    # in plain transformers and peft
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "rm")
    torch.testing.assert_close(logits(theirs), logits(module.trained_model()), rtol=0, atol=1e-5)


@pytest.mark.slow
@quiet_lightning
def test_training_goes_on_from_an_adapter_and_exports_one_that_stands_on_it(tmp_path: Path) -> None:
    """The reference is where the run started, and the folder of the second adapter opens to the trained model."""
    folder = base(tmp_path)
    tokenizer = load_tokenizer(folder)
    first = disturb(add_lora(load_causal_lm(folder), export="adapter"))
    write_model(tmp_path / "one", export_lora(first), tokenizer, {})
    assert torch.allclose(logits(load_causal_lm(str(tmp_path / "one"))), logits(first), atol=1e-5)
    data = PreferenceData(tokenizer, preferences(), preferences(), batch_size=16, cache_dir=tmp_path / "cache")
    module = DPO(partial(load_causal_lm, str(tmp_path / "one")), adam(0.01), lora={"r": 2, "export": "adapter"})
    fit(module, data, 3)
    write_model(tmp_path / "two", module.export_model(), tokenizer, {})
    settings = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str((tmp_path / "one").resolve())
    opened = load_causal_lm(str(tmp_path / "two"))
    torch.testing.assert_close(logits(opened), logits(module.trained_model()), rtol=0, atol=1e-5)
    before = hash_weights(tmp_path / "two")
    model = AutoModelForCausalLM.from_pretrained(folder)
    disturb(model, 1e-3).save_pretrained(folder)
    (tmp_path / "one" / "manifest.json").unlink()
    assert hash_weights(tmp_path / "two") != before  # another base is another model


@pytest.mark.parametrize("export", ["merged", "adapter"])
def test_the_ends_that_a_run_learned_come_with_its_folder(export: str, tmp_path: Path) -> None:
    folder = base(tmp_path)
    model = add_lora(load_causal_lm(folder), export=export)
    exported = export_lora(model)
    exported.generation_config.eos_token_id = [2, 7]
    exported.config.eos_token_id = 7
    write_model(tmp_path / "model", exported, load_tokenizer(folder), {})
    opened = load_causal_lm(str(tmp_path / "model"))
    assert opened.generation_config.eos_token_id == [2, 7]  # type: ignore[union-attr]
    assert opened.config.eos_token_id == 7


# ---- adapters from elsewhere ---------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """An adapter as peft writes it: no config, no tokenizer, a pattern for the layers, a base beside it."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base(tmp_path)),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=r".*\.(q|v)_proj", use_rslora=True,
                   rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 3}),
    )  # fmt: skip
    disturb(model).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_foreign_adapter_is_opened_with_the_tokenizer_and_config_of_its_base(foreign: Path) -> None:
    edit(foreign, base_model_name_or_path="../start")
    assert sorted(file.suffix for file in foreign.iterdir()) == [".json", ".md", ".safetensors"]
    expected = AutoModelForCausalLM.from_pretrained(foreign.parent / "start")
    expected = logits(PeftModel.from_pretrained(expected, foreign))
    opened = load_causal_lm(resolve_model(str(foreign), foreign))
    torch.testing.assert_close(logits(opened), expected, rtol=0, atol=1e-5)
    assert load_tokenizer(str(foreign)).get_vocab() == load_tokenizer(str(foreign.parent / "start")).get_vocab()


def without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def truncated(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit(f, base_model_name_or_path="/nowhere/model"), "trained on /nowhere/model, which is not there"),
        (lambda f: edit(f, base_model_name_or_path=None), "must name the model that the adapter was trained on"),
        (lambda f: edit(f, base_model_name_or_path=str(f)), "stands on itself"),
        (lambda f: edit(f, peft_type="LOHA"), "peft_type=LOHA; only LORA is read"),
        (lambda f: edit(f, megatron_config={"a": 1}, megatron_core="antigravity"), "megatron_con?.* is not supported"),
        (lambda f: edit(f, some_new_feature=True), "some_new_feature=True is not supported"),
        (lambda f: edit(f, r=3), "does not fit the model"),
        (lambda f: edit(f, r=10**9), "the rank 1000000000 is not that of its weights"),
        (lambda f: edit(f, rank_pattern={"v_proj": "x"}), "the rank x is not that of its weights"),
        (lambda f: edit(f, alpha_pattern={"(a+)+$": 3}), "alpha_pattern must map names of layers to numbers"),
        (lambda f: edit(f, rank_pattern=[1]), "rank_pattern must map names of layers to numbers"),
        (lambda f: edit(f, modules_to_save=["lm_head"]), "does not fit the model"),
        (without_weights, "has no adapter_model.safetensors; other formats are not read"),
        (truncated, "adapter_model.safetensors cannot be read"),
    ],
)
def test_a_broken_adapter_is_told(damage: Any, message: str, foreign: Path) -> None:
    damage(foreign)
    with pytest.raises(UserError, match=message):
        load_causal_lm(resolve_model(str(foreign), foreign))


def test_an_adapter_of_another_model_is_told(foreign: Path, tmp_path: Path) -> None:
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path / "other")
    edit(foreign, base_model_name_or_path=str(tmp_path / "other"))
    file = foreign / "adapter_config.json"
    edit(foreign, rank_pattern={}, r=4)
    assert file.is_file()
    with pytest.raises(UserError, match="does not fit the model"):
        load_causal_lm(str(foreign))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"export": "mergd"}, r"adapter\.export='mergd' is not one of merged, adapter\. Did you mean 'merged'\?"),
        ({"modules_to_save": ["lm_haed"]}, r"modules_to_save: the model has no layer lm_haed\..*lm_head"),
    ],
)
def test_mistakes_in_the_settings_are_told(tiny_lm: LlamaForCausalLM, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_lora(tiny_lm, **settings)
