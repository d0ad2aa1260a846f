"""The candidates stage: the same file from any number of devices, after any interruption, readable as preferences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.feedback.shards import merge, places
from tests.helpers.cli import SMALL, newest, rlhf

pytestmark = pytest.mark.xdist_group("candidates")
slow = pytest.mark.slow
REWARDS = """
import os, signal
from pathlib import Path

def length(prompts, responses, metadata):
    return [float(len(r) % 7) for r in responses]

def other(prompts, responses, metadata):
    return [float(len(r) % 3) for r in responses]

def dies(prompts, responses, metadata):
    if "Say 9." in prompts and not Path("died").exists():
        Path("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return length(prompts, responses, metadata)
"""


def test_a_line_that_was_cut_off_is_not_a_row(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_text(
        '{"row": 2, "value": {"x": "é"}}\n{"row": 0, "value": {"x": 1}}\n{"row": 3, "value": {"x"'
    )
    (tmp_path / "1.jsonl").write_text('\n{"row": 1, "value": {"x": 5}}\n')
    assert sorted(places(tmp_path)) == [0, 1, 2]
    target = tmp_path / "merged" / "all.jsonl"
    assert [row["x"] for row in merge(tmp_path, target)] == [1, 5, "é"]
    assert [json.loads(line)["x"] for line in target.read_text().splitlines()] == [1, 5, "é"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 18 prompts, rewards and an SFT model."""
    folder = tmp_path_factory.mktemp("candidates")
    rows = [
        {"prompt": f"Say {i}.", "chosen": f"It is {i}." + " Yes." * (i % 3), "rejected": f"No, {i + 1}!"}
        | {"row": 40 - i, "annotator": "ada"}
        for i in range(18)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    rlhf(
        folder, "stage=sft", "data=preferences/jsonl", "data.train=pairs.jsonl", "max_steps=1", "name=start",
        *SMALL, "model.build.layers=2",
    )  # fmt: skip
    return folder


def candidates(folder: Path, name: str, *more: str, code: int | None = 0) -> Path:
    rlhf(
        folder, "stage=candidates", f"init_from={newest(folder, 'sft')}/model", "data.train=pairs.jsonl",
        "data.batch_size=4", "candidates.max_new_tokens=6", "candidates.num_generations=3", "reward_from=rewards:length",
        f"name={name}", *more, code=code,
    )  # fmt: skip
    return next((folder / "outputs" / "candidates" / name).iterdir())


def read(run: Path) -> list[dict[str, Any]]:
    assert not (run / "shards").exists()
    return [json.loads(line) for line in (run / "candidates.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    return candidates(folder, "alone")


@slow
def test_every_prompt_has_its_responses_scores_and_ranking(folder: Path, alone: Path) -> None:
    rows = read(alone)
    assert [row["prompt"][-1]["content"] for row in rows] == [f"Say {i}." for i in range(18)]
    assert [row["row"] for row in rows] == list(range(40, 22, -1))  # other columns stay
    assert not any("annotator" in row for row in rows)  # but for what was said of other responses
    for row in rows:
        assert row["scores"] == [float(len(text) % 7) for text in row["responses"]]
        assert [sum(b > a for b in row["scores"]) > 0 for a in row["scores"]] == [rank > 0 for rank in row["ranking"]]
        assert all(1 <= tokens <= 6 for tokens in row["tokens"])
    assert len({text for row in rows for text in row["responses"]}) > 18
    metrics = json.loads((alone / "metrics.json").read_text())
    scores = [score for row in rows for score in row["scores"]]
    assert metrics["score"] == pytest.approx(sum(scores) / len(scores))
    assert metrics["best_score"] == pytest.approx(sum(max(row["scores"]) for row in rows) / 18)
    assert (metrics["rows"], metrics["responses"], metrics["monitor"]) == (18, 54, "score")


@slow
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(folder: Path, alone: Path) -> None:
    more = ["reward_from=rewards:dies", "resume=auto"]
    run = candidates(folder, "killed", *more, code=-9)
    done = len(places(run / "shards"))
    assert 0 < done < 18
    assert candidates(folder, "killed", *more) == run
    assert read(run) == read(alone)
    assert "already done" in rlhf(
        folder, "stage=candidates", f"init_from={newest(folder, 'sft')}/model", "data.train=pairs.jsonl",
        "data.batch_size=4", "candidates.max_new_tokens=6", "candidates.num_generations=3", "name=killed", *more,
    ).stdout  # fmt: skip


@slow
@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.nightly), "tensor_parallel"])
def test_two_devices_write_the_file_of_one(strategy: str, folder: Path, alone: Path) -> None:
    # 18 prompts in batches of 4 are five batches: one rank of ddp and fsdp2 has one less, and keeps the other company
    assert read(candidates(folder, strategy, f"strategy={strategy}", "trainer.devices=2")) == read(alone)


@slow
def test_the_file_trains_a_reward_model_which_scores_it(folder: Path, alone: Path) -> None:
    given = [f"init_from={newest(folder, 'sft')}/model", f"data.train={alone}/candidates.jsonl", "data.batch_size=4"]
    rlhf(folder, "stage=reward", *given, "data.on_bad_row=skip", "max_steps=2")
    done = rlhf(folder, "stage=sft", *given, "data=demonstrations/jsonl", "data.on_bad_row=skip", "max_steps=1")
    assert "sft done" in done.stdout  # rejection sampling: the best response of each row
    reward = newest(folder, "reward") / "model"
    scored = candidates(folder, "scored", f"data.train={alone}/candidates.jsonl", "candidates.num_generations=0",
                        f"reward_from={reward}")  # fmt: skip
    before, after = read(alone), read(scored)
    assert [row["responses"] for row in after] == [row["responses"] for row in before]
    assert [row["scores"] for row in after] != [row["scores"] for row in before]
    metrics = json.loads((scored / "metrics.json").read_text())
    assert metrics["best_score"] > metrics["score"]


@slow
def test_equal_texts_share_a_place_and_old_judgements_go(folder: Path) -> None:
    row = {"prompt": "Say yes.", "responses": ["Yes.", "Yes. ", "Yes, sir"], "ranking": [2, 1, 0], "label": 0.2}
    (folder / "same.jsonl").write_text(json.dumps(row | {"scores": [9, 9, 9], "margin": 3}) + "\n")
    (found,) = read(candidates(folder, "same", "data.train=same.jsonl", "candidates.num_generations=0"))
    assert (found["scores"], found["ranking"]) == ([4.0, 5.0, 1.0], [0, 0, 1])
    assert not {"label", "margin"} & found.keys()


@slow
def test_mistakes_are_explained(folder: Path) -> None:
    model = f"init_from={newest(folder, 'sft')}/model"
    found = rlhf(folder, "stage=candidates", model, "data.train=pairs.jsonl", "candidates.num_generations=0", code=2)
    assert "give reward_from" in found.stderr
    (folder / "prompts.jsonl").write_text('{"prompt": "Say hello."}\n')
    given = ["data.train=prompts.jsonl", "reward_from=rewards:length", "candidates.num_generations=0"]
    found = rlhf(folder, "stage=candidates", model, *given, code=2)
    assert "row 1 has no responses to score" in found.stderr
    found = rlhf(folder, "stage=candidates", "data.train=prompts.jsonl", code=2)
    assert "needs a model to start from" in found.stderr


@slow
def test_the_members_of_an_ensemble_disagree_about_a_response(folder: Path) -> None:
    run = candidates(folder, "ensemble", "reward_from=[rewards:length,rewards:other]", "reward_ensemble={uwo:2}")
    for row in read(run):
        for text, score, spread in zip(row["responses"], row["scores"], row["disagreement"], strict=True):
            a, b = len(text) % 7, len(text) % 3
            assert spread == pytest.approx(abs(a - b) / 2)
            assert score == pytest.approx((a + b) / 2 - 2 * spread**2)
        assert "group_scores" not in row
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["disagreement_low"] <= metrics["disagreement"] <= metrics["disagreement_high"]
