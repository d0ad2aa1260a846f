"""The model card of an exported folder: lineage, data and licences as stated, metrics with intervals, how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from rlhf_lightning.models.card import is_hub_data, model_card, text, with_evaluations
from rlhf_lightning.models.folder import MANIFEST

METRICS = {"val/accuracy": 0.8, "val/accuracy_low": 0.7, "val/accuracy_high": 0.9, "val/loss": 0.4, "optim/lr": 1e-3}


def stored(
    folder: Path, start: str, architecture: str = "LlamaForCausalLM", **manifest: Any
) -> tuple[Path, dict[str, Any]]:
    """Write the folder of an exported model without its card."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    complete = {
        "stage": "sft",
        "seed": 3,
        "weights": "ab" * 32,
        "parents": [{"role": "init", "folder": start}],
    } | manifest
    (folder / MANIFEST).write_text(json.dumps(complete))
    return folder, complete


def card(folder: Path, manifest: dict[str, Any]) -> ModelCard:
    return ModelCard(model_card(folder, manifest, MANIFEST))


def test_a_card_names_every_stage_its_data_and_what_is_stated_of_them(tmp_path: Path) -> None:
    sft, _ = stored(
        tmp_path / "sft", "owner/base-model", sources={"train": "owner/demonstrations"}, licenses={"data": "mit"}
    )
    dpo = stored(
        tmp_path / "dpo", str(sft), stage="dpo", sources={"train": "pairs.jsonl"},
        licenses={"model": "apache-2.0", "data": None}, metrics=METRICS,
    )  # fmt: skip
    made = card(*dpo)
    front = made.data.to_dict()
    assert front == {
        "base_model": "owner/base-model", "datasets": ["owner/demonstrations"], "library_name": "transformers",
        "license": "apache-2.0", "pipeline_tag": "text-generation", "tags": ["rlhf", "rlhf_lightning", "dpo"],
    }  # fmt: skip
    rows = [line for line in made.text.splitlines() if line.startswith(("| sft", "| dpo"))]
    assert rows == [
        "| sft | owner/demonstrations (train) | mit | 3 | abababababab |",
        "| dpo | pairs.jsonl (train) | not stated | 3 | abababababab |",
    ]
    assert "| val/accuracy | 0.8 | 0.7 to 0.9 |" in made.text
    assert "| val/loss | 0.4 |  |" in made.text
    assert not [name for name in ("optim/lr", "_low") if name in made.text]
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer\n" in made.text
    assert "vllm serve .\n" in made.text
    assert "ollama create" in made.text


def test_the_licence_of_the_base_model_is_what_its_own_card_states(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    assert "* Licence of the base model: llama3.2" in card(*stored(tmp_path / "sft", str(base))).text
    (base / "README.md").write_bytes(b"---\nlicense: [\xff\n---\n")
    assert "* Licence of the base model: not stated" in card(*stored(tmp_path / "again", str(base))).text


@pytest.mark.parametrize(
    ("architecture", "adapter", "words"),
    [
        ("LlamaForCausalLM", True, ["AutoPeftModelForCausalLM", "--enable-lora"]),
        ("LlamaForSequenceClassification", False, ["AutoModelForSequenceClassification", "--runner pooling"]),
        ("LlamaForSequenceClassification", True, ["AutoPeftModelForSequenceClassification", "num_labels=1"]),
    ],
)
def test_how_to_load_it_is_of_its_kind(architecture: str, adapter: bool, words: list[str], tmp_path: Path) -> None:
    folder, manifest = stored(tmp_path / "model", "owner/base", architecture)
    if adapter:
        (folder / "adapter_config.json").write_text("{}")
    made = card(folder, manifest)
    assert all(word in made.text for word in words)
    assert "ollama create" not in made.text
    assert made.data.library_name == ("peft" if adapter else "transformers")
    assert made.data.pipeline_tag == ("text-classification" if "Sequence" in architecture else "text-generation")


def test_hostile_names_are_text(tmp_path: Path) -> None:
    name = "x\n---\nlicense: other\n<img src=x> | `a`"
    folder, manifest = stored(tmp_path / "model", name, sources={"train": name}, stage=name, licenses={"model": name})
    made = model_card(folder, manifest, MANIFEST)
    front = yaml.safe_load(made.split("\n---\n")[0].removeprefix("---\n"))
    assert front["license"] == name
    assert "base_model" not in front
    assert "<img" not in made.split("\n---\n", 1)[1].replace("\\<img", "")


def test_a_card_of_a_loop_ends(tmp_path: Path) -> None:
    loop = stored(tmp_path / "loop", str(tmp_path / "loop"))
    assert card(*loop).text.count("| sft |") == 16


def test_only_names_of_the_hub_are_data_sets_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows").write_text("")
    assert is_hub_data("owner/name")
    assert not any(map(is_hub_data, ("world", "mine/rows", "/a/b.jsonl", None, "a/b, c/d")))
    assert text("a|b\n`c`") == "a\\|b \\`c\\`"


def test_evaluations_take_the_place_of_older_ones_and_leave_the_rest(tmp_path: Path) -> None:
    made = model_card(*stored(tmp_path / "model", "owner/base"), MANIFEST).replace(
        "* Base model", "* Mine\n* Base model"
    )
    first = with_evaluations(made, {"demo/one/5_evaluate": {"gold": 0.5, "gold_low": 0.4, "gold_high": 0.6}})
    assert "by the run demo/one/5\\_evaluate.\n\n| metric" in first
    assert "\n| gold | 0.5 | 0.4 to 0.6 |\n" in first
    assert first.index("| gold |") < first.index("## How to load it")
    second = with_evaluations(first, {"demo/two/5_evaluate": {"gold": 0.1}, "demo/two/6_again": {"kl": 2.0}})
    assert "demo/one" not in second
    assert [line for line in second.splitlines() if line.startswith(("| gold", "| kl"))] == [
        "| gold | 0.1 |  |",
        "| kl | 2 |  |",
    ]
    assert with_evaluations(second, {"demo/one/5_evaluate": {"gold": 0.5, "gold_low": 0.4, "gold_high": 0.6}}) == first
    begin, end = second.index("<!-- evaluation -->"), second.index("<!-- end of evaluation -->\n\n")
    assert second[:begin] + second[end:].removeprefix("<!-- end of evaluation -->\n\n") == made


def test_a_card_without_how_to_load_it_gets_its_evaluation_at_the_end() -> None:
    once = with_evaluations("# Written by hand\n", {"run": {"gold": 0.5}})
    assert once.startswith("# Written by hand\n\n<!-- evaluation -->\n")
    assert with_evaluations(once, {"run": {"gold": 0.5}}) == once
