"""A pipeline runs its stages in order, skips what is done, and stops at the first that fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_lightning.models.card import text
from rlhf_lightning.runtime.pipeline import of_stage
from tests.helpers.cli import SMALL, rlhf

pytestmark = pytest.mark.slow
QUICK = ["pipeline=demo", "debug=fast", "pipeline.stages.evaluate.set.evaluate.rows=4", *SMALL]
QUICK.append("+pipeline.stages.base.set.data.world.rows=200")  # the tokenizer is trained on all of them
STAGES = ["base", "sft", "reward", "ppo", "dpo", "evaluate"]


def test_the_demo_runs_is_skipped_when_done_and_goes_on_where_something_changed(tmp_path: Path) -> None:
    first = rlhf(tmp_path, *QUICK, fork=False)  # the stages are forks of a server of its own
    assert "pipeline demo done" in first.stdout
    (run,) = (tmp_path / "outputs" / "pipelines" / "demo").iterdir()
    folders = sorted(path.name for path in run.iterdir() if path.is_dir() and path.name[0].isdigit())
    assert folders == [f"{number}_{name}" for number, name in enumerate(STAGES)]
    parents = {
        name: [
            parent["folder"] for parent in json.loads((run / name / "model" / "manifest.json").read_text())["parents"]
        ]
        for name in folders[1:5]
    }
    assert parents == {
        "1_sft": [str(run / "0_base" / "model")],
        "2_reward": [str(run / "1_sft" / "model")],
        "3_ppo": [str(run / "1_sft" / "model"), str(run / "2_reward" / "model")],
        "4_dpo": [str(run / "1_sft" / "model")],
    }
    steps = {name: json.loads((run / name / "metrics.json").read_text())["global_step"] for name in folders[:5]}
    assert set(steps.values()) == {2, 4}  # debug=fast comes before what the pipeline sets; PPO ends an iteration
    metrics = json.loads((run / "5_evaluate" / "metrics.json").read_text())
    assert {"base/gold", "sft/gold", "ppo/gold_low", "dpo/kl", "reward/accuracy"} <= metrics.keys()
    page = run / "report.html"
    assert first.stdout.rstrip().endswith(f"report      {page}")
    report = json.loads(page.with_suffix(".json").read_text())
    assert [row[0]["text"] for row in report["lineage"]["rows"]] == STAGES
    assert report["results"]["evaluate"]["ppo"]["gold"][0] == metrics["ppo/gold"]
    assert {"Gold reward against KL", "Lengths of the answers"} <= {figure["title"] for figure in report["figures"]}
    assert [figure["title"] for figure in report["training"]] == [f"Training: {name}" for name in STAGES[:5]]
    card = (run / "3_ppo" / "model" / "README.md").read_text()
    assert f"by the run {text(f'demo/{run.name}/5_evaluate')}." in card
    assert f"| gold | {metrics['ppo/gold']:.4g} |" in card
    again = rlhf(tmp_path, *QUICK, "resume=auto").stdout
    assert again.count("is done") == len(STAGES)
    assert (run / "3_ppo" / "model" / "README.md").read_text() == card
    (run / "5_evaluate" / "metrics.json").unlink()  # as if it had been killed there
    resumed = rlhf(tmp_path, *QUICK, "resume=auto").stdout
    assert resumed.count("is done") == len(STAGES) - 1
    assert (run / "5_evaluate" / "metrics.json").is_file()


def test_what_the_pipeline_starts_from_reaches_stages_that_do_not_name_their_models() -> None:
    given = ["init_from=mine", "+init_from=mine", "seed=1", "evaluate.rows=8"]
    assert of_stage(given, {"stage": "sft", "max_steps": 3}) == given
    assert of_stage(given, {"stage": "evaluate", "evaluate.rows": 4, "evaluate.reference": "x"}) == given
    for value in ({"init_from": "x"}, {"evaluate.models.sft": "x"}, {"probe.models.a": "x"}):
        assert of_stage(given, {"stage": "evaluate", **value}) == ["seed=1", "evaluate.rows=8"]


def test_an_experiment_that_chooses_a_pipeline_does_not_start_it_again_in_each_stage(tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    mine = "# @package _global_\ndefaults:\n  - override /pipeline: demo\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(mine)
    done = rlhf(tmp_path, "--config-dir", "conf", "experiment=mine", *QUICK[1:-1], code=2)
    assert "stage base of a pipeline" in done.stderr


def test_the_first_failure_ends_it_and_names_the_stage(tmp_path: Path) -> None:
    done = rlhf(tmp_path, *QUICK, "+pipeline.stages.base.set.optimizer.lr=-1", code=2)
    assert "optimizer: Invalid learning rate: -1" in done.stderr
    assert "stage base failed (exit code 2)" in done.stderr
    (run,) = (tmp_path / "outputs" / "pipelines" / "demo").iterdir()
    assert not (run / "1_sft").exists()


LABELS = """# @package _global_
run_folder: pipelines/labels
pipeline:
  name: labels
  stages:
    votes:
      use: {stage: aggregate}
      set: {data.train: labels.jsonl, aggregate.method: soft}
    reward:
      use: {stage: reward, data: preferences/jsonl}
      set: {data.train: "{votes}", max_steps: 1}
    again:
      use: {stage: candidates}
      set: {init_from: "{reward}", reward_from: "{reward}", data.train: "{votes}", candidates.num_generations: 0}
"""


def test_a_stage_reads_the_rows_that_another_wrote(tmp_path: Path) -> None:
    """{name} is the file of a stage that writes rows; labels that change run it again, and what reads it."""
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    (tmp_path / "conf" / "pipeline" / "labels.yaml").write_text(LABELS)
    rows = [
        {"id": str(i), "prompt": f"Say {i}.", "responses": [f"It is {i}.", "No!"], "ranking": rank, "annotator": name}
        for i in range(16)
        for name, rank in (("a", [0, 1]), ("b", [0, 1]), ("c", [1, 0]))
    ]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rlhf(tmp_path, "--config-dir", "conf", "pipeline=labels", *SMALL)
    (run,) = (tmp_path / "outputs" / "pipelines" / "labels").iterdir()
    lines = [json.loads(line) for line in (run / "0_votes" / "preferences.jsonl").read_text().splitlines()]
    assert {row["label"] for row in lines} == {2 / 3}
    assert (run / "1_reward" / "model" / "manifest.json").is_file()
    assert len((run / "2_again" / "candidates.jsonl").read_text().splitlines()) == 16
    resumed = rlhf(tmp_path, "--config-dir", "conf", "pipeline=labels", *SMALL, "resume=auto").stdout
    assert resumed.count("is done") == 3
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[3:]))
    resumed = rlhf(tmp_path, "--config-dir", "conf", "pipeline=labels", *SMALL, "resume=auto").stdout
    assert resumed.count("is done") == 0
    assert len((run / "0_votes" / "preferences.jsonl").read_text().splitlines()) == 15


@pytest.mark.parametrize("name", ["people", pytest.param("groups", marks=pytest.mark.nightly)])
def test_feedback_of_simulated_people_goes_from_candidates_to_the_comparison(name: str, tmp_path: Path) -> None:
    """Every stage reads what those before it wrote: candidates, labels, rows, models."""
    if name == "people":
        pytest.importorskip("crowdkit")
    done = rlhf(
        tmp_path, f"pipeline={name}", *QUICK[1:], "pipeline.stages.candidates.set.candidates.max_new_tokens=8",
        "pipeline.stages.simulate.set.simulate.annotators=10",
    )  # fmt: skip
    assert f"pipeline {name} done" in done.stdout
    (run,) = (tmp_path / "outputs" / "pipelines" / name).iterdir()
    (last,) = run.glob("*_evaluate")
    metrics = json.loads((last / "metrics.json").read_text())
    if name == "people":
        assert {"sft/gold", "ppo/gold_low", "dpo/kl", "reward/accuracy"} <= metrics.keys()
    else:
        assert {
            "majority/gold_cautious",
            "worst/gold_worst",
            "mean/reward_curious",
            "heads/accuracy_worst",
        } <= metrics.keys()


@pytest.mark.parametrize("name", [pytest.param("rlaif", marks=pytest.mark.nightly), "cai"])
def test_a_judge_takes_the_place_of_annotators(name: str, tmp_path: Path) -> None:
    """Candidates, the judge's labels, reward model, PPO and DPO; with a constitution, revisions before."""
    done = rlhf(
        tmp_path, f"pipeline={name}", *QUICK[1:], "pipeline.stages.candidates.set.candidates.max_new_tokens=8",
        "pipeline.stages.judge.set.judge.error_rate=0.2",
    )  # fmt: skip
    assert f"pipeline {name} done" in done.stdout
    (run,) = (tmp_path / "outputs" / "pipelines" / name).iterdir()
    (last,) = run.glob("*_evaluate")
    metrics = json.loads((last / "metrics.json").read_text())
    assert {"sft/gold", "ppo/gold_low", "dpo/kl", "reward/accuracy"} <= metrics.keys()
    (labels,) = run.glob("*_judge/labels.jsonl")
    rows = [json.loads(line) for line in labels.read_text().splitlines()]
    assert {row["annotator"] for row in rows} == {"world"}
    if name == "cai":
        assert "revised/gold" in metrics
        assert {row["judge"].get("principle", row.get("principle")) for row in rows} <= {
            "harmless",
            "helpful",
            "honest",
            "concise",
        }
