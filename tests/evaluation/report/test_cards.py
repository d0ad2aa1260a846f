"""What evaluations of a pipeline measured stands on the cards of its models, and changes nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_lightning.evaluation.report.cards import write_evaluations
from rlhf_lightning.models.card import model_card
from rlhf_lightning.models.folder import MANIFEST, hash_weights, parent_entry
from tests.helpers.results import EVALUATED, stored_pipeline


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A finished pipeline whose models have cards."""
    folder = stored_pipeline(tmp_path / "made")
    for model in folder.glob("*/model"):
        (model / "config.json").write_text("{}")
        manifest = json.loads((model / MANIFEST).read_text())
        (model / "README.md").write_text(model_card(model, manifest, MANIFEST))
    return folder


def rows(folder: Path, stage: str) -> dict[str, str]:
    text = (folder / stage / "model" / "README.md").read_text().partition("## Evaluation")[2]
    lines = [line.split(" | ") for line in text.partition("## How to load it")[0].splitlines()]
    return {line[0].removeprefix("| "): " | ".join(line[1:]).removesuffix(" |") for line in lines if len(line) == 3}


def test_each_model_has_the_figures_of_its_own_name(pipeline: Path) -> None:
    written = write_evaluations(pipeline)
    assert sorted(card.parts[-3] for card in written) == ["0_base", "1_sft", "2_reward", "3_ppo"]
    ppo = rows(pipeline, "3_ppo")
    assert ppo["gold"] == "0.12 | 0 to 0.24"
    assert ppo["length"] == "28 | 27 to 29"
    assert rows(pipeline, "1_sft")["gold"] == "0.1 | 0 to 0.2"
    assert rows(pipeline, "2_reward") == {
        "metric": "value | 95% interval",
        "---": "--- | ---",
        "accuracy": "0.8 | 0.75 to 0.85",
    }
    assert "by the run made/made/4\\_evaluate." in (pipeline / "3_ppo" / "model" / "README.md").read_text()


def test_no_identity_changes_and_a_second_time_writes_nothing(pipeline: Path) -> None:
    models = sorted(pipeline.glob("*/model"))

    def identities() -> list[object]:
        return [
            (hash_weights(model), parent_entry("init", str(model)), (model / MANIFEST).read_bytes()) for model in models
        ]

    before = identities()
    assert len(write_evaluations(pipeline)) == 4
    assert identities() == before
    assert {card.name for model in models for card in model.iterdir()} == {"README.md", "config.json", MANIFEST}
    assert write_evaluations(pipeline) == []


def test_an_evaluation_of_the_start_alone_and_one_of_other_models(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    given = {"init_from": str(folder / "1_sft" / "model"), "evaluate": {"models": {"ppo": str(tmp_path / "elsewhere")}}}
    stored_pipeline(folder, config=given, metrics={"model/gold": 0.25, "gold": 0.25, "ppo/gold": EVALUATED["ppo/gold"]})
    for model in folder.glob("*/model"):
        (model / "README.md").write_text("# A card\n")
    assert write_evaluations(folder) == [folder / "1_sft" / "model" / "README.md"]
    assert rows(folder, "1_sft")["gold"] == "0.25 | "


def test_an_unfinished_evaluation_and_a_folder_without_a_card_are_left(tmp_path: Path) -> None:
    assert write_evaluations(stored_pipeline(tmp_path / "no_cards")) == []
    folder = stored_pipeline(tmp_path / "unfinished", metrics=None)
    for model in folder.glob("*/model"):
        (model / "README.md").write_text("# A card\n")
    assert write_evaluations(folder) == []
