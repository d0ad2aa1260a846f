"""Scores of held-out rows and of changed responses, and what `stage=evaluate` writes about a reward model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.data.datamodules import PreferenceData
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.reward_model import Scorer, scored_pairs
from rlhf_lightning.models.heads import with_heads
from rlhf_lightning.models.loading import load_scalar_model, load_tokenizer
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages import STAGES
from rlhf_lightning.stages import evaluate as stage
from tests.evaluation.scored import texts
from tests.evaluation.test_reward_bench import PUBLISHED, TIED
from tests.helpers.compose import composed
from tests.modules.offline import start

pytestmark = pytest.mark.slow
COLUMNS = {
    "calibration": {"model", "bin_low", "bin_high", "count", "predicted", "observed", "low", "high"},
    "margins": {"model", "by", "bucket", "count", "accuracy", "low", "high"},
    "lengths": {"model", "by", "bucket", "count", "accuracy", "low", "high"},
    "sources": {"model", "by", "bucket", "count", "accuracy", "low", "high"},
    "annotators": {"model", "by", "bucket", "count", "accuracy", "low", "high"},
    "ngrams": {"model", "ngram", "count", "effect", "low", "high", "found"},
    "paraphrases": {"model", "change", "count", "shift", "low", "high", "flipped", "overtaken"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A reward model with one head, one with two, both with statistics, and the language model they start from."""
    root = tmp_path_factory.mktemp("scorer")
    found = {"lm": start(root)}
    for name, names in (("one", None), ("two", ["a", "b"])):
        model = with_heads(lambda: load_scalar_model(found["lm"]), names)
        torch.manual_seed(0)
        torch.nn.init.normal_(model.score.weight)
        model.config.reward_mean, model.config.reward_std = ([0.5, -1.0], [2.0, 0.5]) if names else (0.5, 2.0)
        model.save_pretrained(root / name)
        load_tokenizer(found["lm"]).save_pretrained(root / name)
        found[name] = str(root / name)
    return found


def write(path: Path, count: int = 24, **columns: Any) -> str:
    rows = [
        {"prompt": f"name w{i}", "chosen": better, "rejected": worse, "source": "uv"[i % 2], "annotator": f"p{i % 3}"}
        | columns
        for i, (better, worse) in enumerate(texts(count, 0, "the oracle", 0.6, 4, 9))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def held_out(folder: str, rows: str, tmp_path: Path, **options: Any) -> PreferenceData:
    data = PreferenceData(load_tokenizer(folder), None, val=rows, cache_dir=tmp_path / "cache", **options)
    data.setup()
    return data


def test_unchanged_responses_have_the_scores_of_the_held_out_rows(folders: dict[str, str], tmp_path: Path) -> None:
    data = held_out(folders["one"], write(tmp_path / "rows.jsonl"), tmp_path, keep_rows=True)
    scorer = Scorer(load_scalar_model(folders["one"], trained=True), data)
    rows = scorer.held_out()
    again = scorer.rescore([(row, row.responses) for row in rows[::-1]])[::-1]
    assert [s for row in again for s in row] == pytest.approx([s for row in rows for s in row.scores], abs=1e-5)
    (other,) = scorer.rescore([(rows[0], ["w1", rows[0].responses[1]])])
    assert other[0] != pytest.approx(rows[0].scores[0], abs=1e-3)
    assert other[1] == pytest.approx(rows[0].scores[1], abs=1e-5)
    for pair in scored_pairs(rows):
        assert pair.logit == pytest.approx(2.0 * pair.gap, abs=1e-5)  # as it was trained: times reward_std
    assert all(row.is_whole for row in rows)
    assert rows[3].columns["source"] == "v"


def test_a_cut_response_is_not_whole(folders: dict[str, str], tmp_path: Path) -> None:
    data = held_out(folders["one"], write(tmp_path / "rows.jsonl"), tmp_path, max_length=40)
    rows = Scorer(load_scalar_model(folders["one"], trained=True), data).held_out()
    whole = [row.is_whole for row in rows]
    assert True in whole
    assert False in whole
    with pytest.raises(UserError, match=r"PreferenceData\(keep_rows=True\) is needed"):
        Scorer(load_scalar_model(folders["one"], trained=True), data).rescore([(rows[0], ["w1"])])


def test_a_row_is_scored_by_the_head_of_its_group(folders: dict[str, str], tmp_path: Path) -> None:
    found = {}
    for group in ("a", "b", ""):
        data = held_out(folders["two"], write(tmp_path / f"{group}.jsonl", 6, group=group), tmp_path, keep_rows=True)
        scorer = Scorer(load_scalar_model(folders["two"], trained=True), data)
        rows = scorer.held_out()
        found[group] = rows
        again = scorer.rescore([(row, row.responses) for row in rows])
        assert [s for row in again for s in row] == pytest.approx([s for row in rows for s in row.scores], abs=1e-5)
    for a, b, both in zip(*found.values(), strict=True):
        assert both.scores == pytest.approx([(x + y) / 2 for x, y in zip(a.scores, b.scores, strict=True)], abs=1e-5)
        assert a.logits == pytest.approx([2.0 * s for s in a.scores], abs=1e-5)
        assert b.logits == pytest.approx([0.5 * s for s in b.scores], abs=1e-5)


def evaluated(folders: dict[str, str], rows: str, tmp_path: Path, *overrides: str) -> Path:
    cfg = composed(
        "stage=evaluate", f"evaluate.preferences={rows}", f"paths.run={tmp_path}", f"paths.cache={tmp_path / 'cache'}",
        "logger=none", *overrides,
    )  # fmt: skip
    stage.run(Run(STAGES["evaluate"], cfg, tmp_path))
    return tmp_path


def test_the_stage_writes_tables_samples_and_metrics(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = evaluated(
        folders, write(tmp_path / "rows.jsonl"), tmp_path, f"init_from={folders['one']}", "evaluate.changed_rows=12"
    )
    tables = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in (run / "tables").iterdir()
    }
    assert tables.keys() == COLUMNS.keys()
    for name, lines in tables.items():
        assert {key for line in lines for key in line} == COLUMNS[name], name
        assert {line["model"] for line in lines} == {"model"}
    metrics = json.loads((run / "metrics.json").read_text())
    assert [(line["by"], line["bucket"], line["count"]) for line in tables["sources"]] == [
        ("source", "u", 12),
        ("source", "v", 12),
    ]
    shares = [line["accuracy"] for line in tables["sources"]]
    assert sum(shares) / 2 == pytest.approx(metrics["model/accuracy"])
    for name in ("length_controlled_accuracy", "length_pearson", "length_spearman", "brier", "format_flipped"):
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"], name
    assert {"calibration_error", "ngrams_found"} <= metrics.keys()
    assert metrics["monitor"] == "model/accuracy"
    samples = [json.loads(line) for line in (run / "samples" / "model.jsonl").read_text().splitlines()]
    assert len(samples) == 48
    assert samples[2].keys() == {"row", "prompt", "response", "rank", "score"}
    assert samples[2]["prompt"].endswith("name w1")
    right = sum(samples[i]["score"] > samples[i + 1]["score"] for i in range(0, 48, 2))
    assert right / 24 == pytest.approx(metrics["model/accuracy"])
    printed = capsys.readouterr().out
    assert "model: changed formats" in printed
    assert f"tables      {run / 'tables'}" in printed


def test_rows_of_reward_bench_are_evaluated_as_they_are(folders: dict[str, str], tmp_path: Path) -> None:
    lines = [PUBLISHED | {"prompt": f"Name color {i}."} for i in range(6)]
    lines += [TIED, TIED | {"id": "ref:0", "chosen": ["Red."]}]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = evaluated(folders, str(tmp_path / "bench.jsonl"), tmp_path, f"init_from={folders['one']}")
    metrics = json.loads((run / "metrics.json").read_text())
    sources = [json.loads(line) for line in (run / "tables" / "sources.jsonl").read_text().splitlines()]
    scores = {line["bucket"]: line["accuracy"] for line in sources if line["by"] != "subset"}
    assert scores.keys() == {"Factuality", "Ties"}
    assert metrics["best_of_accuracy"] == scores["Factuality"] in (0.0, 1.0)  # the same four responses six times
    assert metrics["reward_bench"] == pytest.approx((scores["Factuality"] + scores["Ties"]) / 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["init_from={one}", "evaluate.changed_rows=-1"],
            r"evaluate.changed_rows=-1 is not a whole number in \[0, inf\)",
        ),
        (
            ["init_from={one}", "evaluate.diagnostics=false", "evaluate.changed_rows=4"],
            "evaluate.changed_rows=4 is of the diagnostics",
        ),
        (
            ["init_from={one}", "evaluate.source_column=sorce"],
            "evaluate.source_column=sorce: the rows have .* Did you mean 'source'",
        ),
        (
            ["init_from={one}", "reward_from=[world,world]", "reward_ensemble=worst"],
            "reward_ensemble=worst is of the rewards of responses",
        ),
        (["init_from={lm}", "evaluate.source_column=source"], "is of reward models, and none is evaluated"),
    ],
)
def test_options_without_effect_are_refused(
    folders: dict[str, str], overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        evaluated(folders, write(tmp_path / "rows.jsonl", 4), tmp_path, *(o.format(**folders) for o in overrides))


def test_without_diagnostics_there_is_the_accuracy(folders: dict[str, str], tmp_path: Path) -> None:
    run = evaluated(
        folders, write(tmp_path / "rows.jsonl"), tmp_path, f"init_from={folders['one']}", "evaluate.diagnostics=false"
    )
    assert not (run / "tables").exists()
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"accuracy", "shorter_accuracy"} <= metrics.keys()
    assert "brier" not in metrics
