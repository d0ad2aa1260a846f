"""Loading models: what is broken is told, no weight is made up at random, no foreign code runs."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.completion import CompletionModel, ScalarModel
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.ops.groups import Group, pack

TEXTS = [f"the {animal} sat on the mat {i} times" for i in range(40) for animal in ("cat", "dog", "owl")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("loading") / "tiny"
    return Path(build_tiny(place, TEXTS, vocab_size=320, hidden_size=32, layers=2, heads=2, max_length=64))


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy of a tiny model folder to break."""
    return Path(shutil.copytree(built, tmp_path / "tiny"))


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    found = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def drop_weight(folder: Path, key: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[key]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pad_is_eos(folder: Path) -> None:
    edit(folder / "config.json", pad_token_id=2)
    edit(folder / "tokenizer_config.json", pad_token="<|eos|>")


# tokenizers


def test_the_tokenizer_of_a_folder_keeps_its_padding(built: Path) -> None:
    assert load_tokenizer(str(built)).pad_token == "<|pad|>"


@pytest.mark.parametrize("pad", ["<|eos|>", None])
def test_padding_is_never_eos_where_the_vocabulary_has_another(folder: Path, pad: str | None) -> None:
    edit(folder / "tokenizer_config.json", pad_token=pad)
    before = AutoTokenizer.from_pretrained(folder)
    assert before.pad_token == pad
    after = load_tokenizer(str(folder))
    assert after.pad_token == "<|bos|>"
    assert after.eos_token == "<|eos|>"
    assert after.get_vocab() == before.get_vocab()
    edit(folder / "tokenizer_config.json", pad_token=pad, bos_token="<|eos|>")
    assert load_tokenizer(str(folder)).pad_token == "<|eos|>"  # nothing else to choose


# language models


def test_a_language_model_has_the_precision_and_dropout_asked_for(folder: Path) -> None:
    model = load_causal_lm(str(folder))
    assert model.dtype == torch.float32
    assert model.training
    assert model.config.attention_dropout == 0.0
    edit(folder / "config.json", attention_dropout=0)  # some published configs hold an integer
    model = load_causal_lm(str(folder), dtype="bfloat16", dropout=0.25)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.attention_dropout == 0.25


def test_dropout_of_an_architecture_is_off_unless_asked_for(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    assert config.resid_pdrop == 0.1
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for asked in (0.0, 0.3):
        model = load_causal_lm(str(tmp_path), dropout=asked)
        assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {asked}


def test_gradient_checkpointing_gives_the_same_gradients(built: Path) -> None:
    ids = torch.tensor([[1, 30, 40, 50, 2]])
    found = []
    for on in (False, True):
        model = load_causal_lm(str(built), gradient_checkpointing=on)
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == on
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-7)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")  # the compiler makes warnings of its own
def test_compiled_layers_give_the_same_gradients(built: Path) -> None:
    batch = pack([Group([1, 30, 40], [[50, 2], [60, 61, 2]]), Group([1, 31], [[51, 52, 53, 2]])])
    found = []
    for on in (False, True):
        model = load_causal_lm(str(built), compile=on)
        assert any(m._compiled_call_impl is not None for m in model.modules()) == on
        CompletionModel(model)(batch).logprobs.sum().backward()
        found.append([p.grad for p in model.parameters()])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)  # fused operations round differently


def test_an_unknown_precision_names_the_nearest(built: Path) -> None:
    with pytest.raises(UserError, match=r"'float3' is not one of .* Did you mean 'float32'"):
        load_causal_lm(str(built), dtype="float3")


# scalar models


@pytest.mark.slow
def test_a_new_head_is_seeded_normal_noise_and_nothing_global(built: Path) -> None:
    torch.manual_seed(1)
    first = load_scalar_model(str(built), seed=7)
    torch.manual_seed(2)
    assert torch.equal(load_scalar_model(str(built), seed=7).score.weight, first.score.weight)
    assert not torch.equal(load_scalar_model(str(built), seed=8).score.weight, first.score.weight)
    heads = torch.stack([load_scalar_model(str(built), seed=i).score.weight for i in range(40)])  # 1280 draws
    assert heads.shape[-2:] == (1, 32)
    assert first.score.bias is None
    assert heads.std().item() * 33**0.5 == pytest.approx(1, abs=0.1)
    assert heads.mean().item() == pytest.approx(0, abs=0.03)
    lm = load_causal_lm(str(built))
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, lm.model.state_dict()[name])


def test_a_trained_head_and_its_normalization_come_back(built: Path, tmp_path: Path) -> None:
    model = load_scalar_model(str(built), seed=7)
    model.config.reward_mean, model.config.reward_std = 0.5, 2.0
    model.save_pretrained(tmp_path / "rm")
    again = load_scalar_model(str(tmp_path / "rm"), seed=8, trained=True)
    assert torch.equal(again.score.weight, model.score.weight)
    assert (again.config.reward_mean, again.config.reward_std) == (0.5, 2.0)


@pytest.mark.parametrize("change", [None, pad_is_eos], ids=["own padding", "padding is EOS"])
def test_the_exported_reward_model_scores_alike_in_plain_transformers(
    folder: Path, tmp_path: Path, change: Callable[[Path], None] | None
) -> None:
    if change:
        change(folder)
    tokenizer, model = load_tokenizer(str(folder)), load_scalar_model(str(folder)).eval()
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = [
        ["the cat", " sat on<|eos|>"],
        ["the dog sat on the mat", " 3 times and more<|eos|>"],
        ["a", "<|eos|>"],
    ]
    groups = [Group(tokenizer.encode(prompt), [tokenizer.encode(response)]) for prompt, response in texts]
    with torch.no_grad():
        ours = ScalarModel(model)(pack(groups))
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    rows = [{"input_ids": [*g.prompt, *g.responses[0]]} for g in groups]
    batch = AutoTokenizer.from_pretrained(tmp_path / "rm").pad(rows, return_tensors="pt")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        theirs = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_a_reward_model_is_not_a_language_model_nor_the_reverse(built: Path, tmp_path: Path) -> None:
    load_scalar_model(str(built)).save_pretrained(tmp_path / "rm")
    with pytest.raises(UserError, match="rm is a reward model"):
        load_causal_lm(str(tmp_path / "rm"))
    with pytest.raises(UserError, match="tiny is not a reward model folder"):
        load_scalar_model(str(built), trained=True)


# broken folders


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncated_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def one_layer_missing(folder: Path) -> None:
    drop_weight(folder, "model.layers.1.mlp.up_proj.weight")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_weights, "no file named model.safetensors"),
        (truncated_weights, "does not hold a usable model"),
        (one_layer_missing, "incomplete: its weights lack model.layers.1.mlp.up_proj.weight"),
        (lambda f: edit(f / "config.json", intermediate_size=48), "shapes of the weights"),
        (lambda f: (f / "config.json").write_text("{"), "not readable JSON"),
        (lambda f: edit(f / "config.json", model_type="unheard-of"), "unheard-of"),
        (lambda f: edit(f / "config.json", model_type="t5"), "AutoModelForCausalLM"),
    ],
)
def test_a_broken_folder_is_told_with_its_name(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_causal_lm(str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("labels", [2, 5])
def test_a_classifier_of_several_labels_is_no_reward_model(folder: Path, labels: int, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    model.save_pretrained(tmp_path / "many")
    with pytest.raises(UserError, match=rf"many is a classifier with {labels} labels; a reward model has one"):
        load_scalar_model(str(tmp_path / "many"), trained=True)


def test_shapes_of_another_model_are_not_called_labels(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.save_pretrained(tmp_path / "one")
    edit(tmp_path / "one" / "config.json", hidden_size=64)
    with pytest.raises(UserError, match="one: the shapes of the weights are not those of its config.json"):
        load_scalar_model(str(tmp_path / "one"), trained=True)


def test_a_reward_model_that_lost_its_head_is_refused(built: Path, tmp_path: Path) -> None:
    load_scalar_model(str(built)).save_pretrained(tmp_path / "rm")
    drop_weight(tmp_path / "rm", "score.weight")
    with pytest.raises(UserError, match=r"its weights lack score\.weight"):
        load_scalar_model(str(tmp_path / "rm"), trained=True)


def test_a_folder_without_a_tokenizer_is_told(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tiny does not hold a usable model"):
        load_tokenizer(str(folder))


# security


class Payload:
    """Pickles to a call that writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_pickled_weights_are_not_opened(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # the payload works
    marker.unlink()
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(UserError, match=r"no file named model\.safetensors"):
        load_causal_lm(str(folder))
    assert not marker.exists()


def test_code_in_a_model_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    edit(folder / "config.json", model_type="evil", auto_map=classes)
    for load in (load_causal_lm, load_scalar_model):
        with pytest.raises(UserError, match="custom code"):
            load(str(folder))
    assert not marker.exists()


# the hub and real models


def test_without_the_hub_the_message_asks_for_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for load in (load_tokenizer, load_causal_lm):
        with pytest.raises(UserError, match=r"'nobody/nothing' is neither .* give a folder or a GGUF file"):
            load("nobody/nothing")
    (folder.parent / "outputs").mkdir()
    (folder.parent / "outputs" / "sft").mkdir()
    monkeypatch.chdir(folder.parent)
    with pytest.raises(UserError, match="Did you mean 'sft'"):
        load_causal_lm("outputs/stf")


def test_a_real_pretrained_model_opens(stories_model: Path) -> None:
    model, tokenizer = load_causal_lm(str(stories_model)).eval(), load_tokenizer(str(stories_model))
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert loss < 4  # log(512) = 6.2 for a model that knows nothing
    plain = AutoModelForCausalLM.from_pretrained(stories_model).eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert load_scalar_model(str(stories_model)).config.pad_token_id == 0
