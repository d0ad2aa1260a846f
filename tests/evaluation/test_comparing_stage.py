"""stage=evaluate with a judge, answers from files and several attempts: files, figures, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import open_dict

from rlhf_lightning.data.comparisons import Comparison
from rlhf_lightning.errors import UserError
from rlhf_lightning.judges.judge import UNREADABLE, Answer, Rating
from rlhf_lightning.judges.world import WorldJudge
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages import STAGES
from rlhf_lightning.stages import evaluate as stage
from rlhf_lightning.stages.comparing import check_distinct
from rlhf_lightning.world import rows
from tests.helpers.compose import composed

pytestmark = pytest.mark.slow
EXACT = "rlhf_lightning.rewards.checkers:exact_answer"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model, and the same with noise on its weights."""
    root = tmp_path_factory.mktemp("models")
    texts = (message["content"] for row in rows("demonstrations", 200) for message in row["messages"])
    start = build_tiny(root / "start", texts, vocab_size=300, hidden_size=32, layers=2, heads=2)
    moved = load_causal_lm(start)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in moved.parameters():
            weight.add_(0.3 * weight.std() * torch.randn_like(weight)) if weight.ndim == 2 else None
    moved.save_pretrained(root / "moved")
    load_tokenizer(start).save_pretrained(root / "moved")
    return {"start": start, "moved": str(root / "moved")}


def evaluate(
    folder: Path, *overrides: str, models: dict[str, str] | None = None, answers: Any = None
) -> dict[str, Any]:
    """Run the stage in `folder` and return its metrics."""
    cfg = composed("stage=evaluate", f"paths.cache={folder / 'cache'}", f"paths.run={folder}", "~logger", *overrides)
    with open_dict(cfg):
        cfg.evaluate.models, cfg.evaluate.answers = models or {}, answers or {}
    stage.run(Run(STAGES["evaluate"], cfg, folder))
    return json.loads((folder / "metrics.json").read_text())


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "tables" / f"{name}.jsonl").read_text().splitlines()]


WORLD = ("data=world", "data.world.val_rows=24", "evaluate.max_new_tokens=6", "gold_from=world")


@pytest.fixture(scope="module")
def compared(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Two models, a file of answers made of the rows that the stage reads, and the world's judge."""
    folder = tmp_path_factory.mktemp("compared")
    evaluate(folder, *WORLD, models={"start": folders["start"]})
    answers = [json.loads(line) for line in (folder / "samples" / "start.jsonl").read_text().splitlines()]
    given = folder / "no.jsonl"
    given.write_text("".join(json.dumps({"prompt": row["prompt"], "response": "No."}) + "\n" for row in answers[:20]))
    (folder / "run").mkdir()
    metrics = evaluate(folder / "run", *WORLD, "judge=world", models=folders, answers={"no": str(given)})
    return folder / "run", metrics, str(given)


def test_the_tables_of_the_store(compared: tuple[Path, dict[str, Any], str]) -> None:
    folder, metrics, _ = compared
    found = table(folder, "win_rates")
    pairs = [("moved", "start"), ("no", "start"), ("no", "moved")]
    assert [(row["model"], row["opponent"], row["by"]) for row in found] == [
        (*pair, by) for by in ("gold", "judge") for pair in pairs
    ]
    for row in found:
        assert row["count"] == row["wins"] + row["ties"] + row["losses"] == (20 if "no" in row["model"] else 24)
        assert row["win_rate"] == (row["wins"] + row["ties"] / 2) / row["count"]
        assert row["low"] <= row["win_rate"] <= row["high"]
        name = f"{row['model']}-{row['opponent']}/{row['by']}"
        assert metrics[f"{name}_win_rate"] == pytest.approx(row["win_rate"])
        assert metrics[f"{name}_win_rate_low"] == pytest.approx(row["low"])
        assert metrics[f"{name}_length_controlled"] == row["length_controlled"]
    assert all(one["outcome"] in (0, 0.5, 1) for one in table(folder, "verdicts"))
    assert len(table(folder, "verdicts")) == 24 + 20 + 20
    ratings = {(row["model"], row["by"]): row for row in table(folder, "ratings")}
    assert metrics["no/gold_rating"] == ratings["no", "gold"]["rating"]
    assert ratings["no", "gold"]["low"] < ratings["no", "gold"]["rating"] < ratings["no", "gold"]["high"]


def test_the_judge_of_the_world_decides_as_gold_does(compared: tuple[Path, dict[str, Any], str]) -> None:
    by = {(row["model"], row["opponent"], row["by"]): row for row in table(compared[0], "win_rates")}
    for model, opponent, decider in by:
        if decider == "judge":
            assert by[model, opponent, "judge"]["wins"] == by[model, opponent, "gold"]["wins"]


def test_answers_of_a_file_are_samples_like_others(compared: tuple[Path, dict[str, Any], str]) -> None:
    folder, metrics, _ = compared
    samples = [json.loads(line) for line in (folder / "samples" / "no.jsonl").read_text().splitlines()]
    assert {row["response"] for row in samples} == {"No."}
    assert metrics["no/gold"] == pytest.approx(sum(row["gold"] for row in samples) / 20)
    assert metrics["no/characters"] == 3
    assert metrics["monitor"] == "moved/gold"


def test_files_alone_need_no_model(compared: tuple[Path, dict[str, Any], str], tmp_path: Path, capsys: Any) -> None:
    """Two files of answers to GSM8K-like questions, several attempts each, in other orders."""
    rows_ = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(12)]
    for name, shift in (("right", 0), ("wrong", 1)):
        lines = [
            row | {"response": f"It is {i + 1 + shift * (i + k > 6)}."} for i, row in enumerate(rows_) for k in range(4)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines[:: 1 - 2 * shift]))
    answers = {name: str(tmp_path / f"{name}.jsonl") for name in ("right", "wrong")}
    metrics = evaluate(
        tmp_path, f"gold_from={EXACT}", "evaluate.pass_at=[1,4]", "evaluate.majority_at=3", "evaluate.rows=10",
        answers=answers,
    )  # fmt: skip
    assert metrics["right/pass_at_1"] == metrics["right/majority_at_3"] == 1.0
    right = [[i + k <= 6 for k in range(4)] for i in range(2, 12)]  # the last rows come first in the other file
    assert metrics["wrong/gold"] == metrics["wrong/pass_at_1"] < 1
    assert metrics["wrong/pass_at_4"] > metrics["wrong/pass_at_1"] > metrics["wrong/pass_at_1_low"]
    assert sum(map(sum, right)) / 40 <= metrics["wrong/pass_at_1"]
    assert metrics["monitor"] == "wrong/gold"
    printed = capsys.readouterr().out
    assert "right: 8 of 48 answers are left out, beyond evaluate.rows=10 prompts" in printed
    assert "pass@4 (95%)" in printed
    assert "wrong vs right, by gold" in printed


def test_several_attempts_of_a_model(folders: dict[str, str], tmp_path: Path) -> None:
    rows_ = [{"prompt": f"Say {i}.", "answer": str(i)} for i in range(6)]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))
    metrics = evaluate(
        tmp_path, f"gold_from={EXACT}", f"data.val={tmp_path / 'val.jsonl'}", f"init_from={folders['start']}",
        "evaluate.num_generations=4", "evaluate.max_new_tokens=8", "evaluate.pass_at=[1,4]", "evaluate.majority_at=[4]",
    )  # fmt: skip
    assert metrics["pass_at_1"] == pytest.approx(metrics["gold"])
    assert metrics["pass_at_4"] >= metrics["pass_at_1"]
    assert metrics["majority_at_4_low"] <= metrics["majority_at_4"] <= 1


class Failing(WorldJudge):
    """Rates every second response only."""

    def rate(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, tuple[Rating, ...]]]:
        for place, ratings in super().rate(comparisons):
            failed = Rating((Answer(None, UNREADABLE),))
            yield place, tuple(failed if i % 2 or self.error_rate else r for i, r in enumerate(ratings))


@pytest.mark.parametrize("all_of_them", [False, True])
def test_failed_ratings_of_a_judge_are_left_out(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, all_of_them: bool
) -> None:
    """They are counted; the best of n is chosen among the others, and where there is no rating there is none."""
    monkeypatch.setattr("rlhf_lightning.judges.world.WorldJudge", Failing)
    metrics = evaluate(
        tmp_path, *WORLD, "reward_from=judge:world", "judge=world", f"judge.error_rate={float(all_of_them)}",
        "evaluate.num_generations=2", "evaluate.best_of=2", "evaluate.rows=8", models={"start": folders["start"]},
    )  # fmt: skip
    printed = capsys.readouterr().out
    if all_of_them:
        assert "start: 16 of 16 answers got no rating by reward, and are left out" in printed
        assert metrics["start/reward_failed"] == 1.0
        assert "start/reward" not in metrics
        assert "start_bo2/length" not in metrics
        return
    samples = [json.loads(line) for line in (tmp_path / "samples" / "start.jsonl").read_text().splitlines()]
    rated = [row for row in samples if "reward" in row]
    assert metrics["start/reward_failed"] == 1 - len(rated) / 16
    assert 0 < len(rated) < 16
    assert f"start: {16 - len(rated)} of 16 answers got no rating by reward" in printed
    assert metrics["start/reward"] == pytest.approx(sum(row["reward"] for row in rated) / len(rated))
    assert metrics["start_bo2/reward"] >= metrics["start/reward"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["judge=world"], "judge= compares the answers of two models"),
        (["evaluate.against=start"], r"evaluate\.against=start: there is no other model"),
        (["evaluate.best_of=2", "evaluate.num_generations=2", "reward_from=world", "evaluate.against=start_b"],
         r"evaluate.against=start_b is none of start, start_bo2. Did you mean 'start_bo2'"),
        (["evaluate.pass_at=2", f"gold_from={EXACT}"], "evaluate.pass_at=2 needs evaluate.num_generations=2 or more"),
        (["evaluate.majority_at=[0]", f"gold_from={EXACT}"], r"evaluate.majority_at=0 is not a whole number in \[1, inf\)"),
        (["evaluate.pass_at=1", "gold_from=null"], "evaluate.pass_at needs a verifiable reward"),
        (["evaluate.pass_at=1"], r"count rewards of 0 and 1; one of gold is -?[\d.]+"),
    ],
)  # fmt: skip
def test_mistakes_of_a_comparison(folders: dict[str, str], tmp_path: Path, overrides: list[str], message: str) -> None:
    given = [w for w in WORLD if w.partition("=")[0] not in {o.partition("=")[0] for o in overrides}]
    with pytest.raises(UserError, match=message):
        evaluate(tmp_path, *given, "evaluate.rows=4", *overrides, models={"start": folders["start"]})


@pytest.mark.parametrize(
    ("overrides", "answers", "message"),
    [
        (["judge=world"], "a.jsonl", r"evaluate\.answers=a\.jsonl is no map"),
        ([], {"a": "A", "b": "A"}, r"evaluate\.answers\.a: choose what decides which answer is better: judge=, gold_from"),
        (["judge=world"], {"a": "A", "b": "missing.jsonl"}, r"^evaluate\.answers\.b: there is no file missing.jsonl"),
        (["gold_from=world", "evaluate.best_of=2", "reward_from=world"], {"a": "A"}, "not of evaluate.answers"),
        (["judge=world", "evaluate.against=c"], {"a": "A", "b": "A"}, "evaluate.against=c is none of a, b"),
        (["judge=world"], {"a": "A", "b": "A"}, r"is no row of the built-in world"),
    ],
)  # fmt: skip
def test_mistakes_of_files(tmp_path: Path, overrides: list[str], answers: Any, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "response": "other"}\n')
    places = answers
    if isinstance(answers, dict):
        places = {name: value.replace("A", str(tmp_path / f"{name}.jsonl")) for name, value in answers.items()}
    with pytest.raises(UserError, match=message):
        evaluate(tmp_path, *overrides, answers=places)


@pytest.mark.parametrize(
    ("models", "answers", "message"),
    [
        ({"a": "", "b": ""}, ["a"], "evaluate.answers.a: this is the name of a model"),
        ({"a": "", "a_bo2": ""}, [], "evaluate.models.a_bo2: this is the name of a model"),
        ({"a": ""}, ["longer"], "evaluate.answers.longer: this is the name of a baseline"),
        ({"a": "", "b": "", "b-a": ""}, [], "evaluate.models.b-a: this is the name of a difference of two others"),
    ],
)
def test_every_row_of_the_results_has_a_name_of_its_own(models: Any, answers: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_distinct(models, answers, ["a_bo2"], ["longer"])
    check_distinct(["a", "my-dpo", "b"], ["c"], ["a_bo2"], ["longer"])


def test_the_name_of_a_model_is_taken(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    with pytest.raises(UserError, match=r"evaluate\.answers\.start: this is the name of a model"):
        evaluate(tmp_path, *WORLD, models=folders, answers={"start": str(tmp_path / "a.jsonl")})
    with pytest.raises(UserError, match=r"evaluate\.answers\.other: none of its 1 prompts is one that is compared"):
        evaluate(tmp_path, *WORLD, models=folders, answers={"other": str(tmp_path / "a.jsonl")})
