"""Sweeps: trials fail alone, several ranks a trial work, finished trials are skipped, and the summary says what came out."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from rlhf_lightning.__main__ import sweep_id
from rlhf_lightning.runtime import sweeps
from tests.helpers.cli import SMALL, rlhf


def made(folder: Path, betas: list[float], metrics: list[dict[str, float] | None]) -> list[sweeps.Trial]:
    """Write a sweep's folder as if it had run and return its trials."""
    for number, (beta, found) in enumerate(zip(betas, metrics, strict=True)):
        place = folder / str(number)
        place.mkdir(parents=True)
        record: dict[str, Any] = {"number": number, "overrides": ["stage=ppo", f"ppo.kl_beta={beta}"], "seconds": 61.0}
        record |= {"status": "failed: exit code 1"} if found is None else {"status": "done", "objectives": found}
        (place / "trial.json").write_text(json.dumps(record))
        if found is not None:
            (place / "metrics.json").write_text(json.dumps({"monitor": "val/gold", **found, "train/loss": 0.5}))
    return sweeps.read_trials(folder)


@pytest.mark.slow
def test_the_summary_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = [
        {"val/gold": 0.5, "val/kl": 3.0},
        None,
        {"val/gold": 0.7, "val/kl": 9.0},
        {"val/gold": 0.6, "val/kl": 1.0},
    ]
    trials = made(tmp_path, [0.01, 0.1, 1.0, 10.0], scores)  # type: ignore[arg-type]
    sweeps.summarize(tmp_path, trials)
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [row["ppo.kl_beta"] for row in rows] == ["0.01", "0.1", "1.0", "10.0"]
    assert [row["val/gold"] for row in rows] == ["0.5", "", "0.7", "0.6"]
    assert [row["status"] for row in rows] == ["done", "failed: exit code 1", "done", "done"]
    assert rows[0]["train/loss"] == "0.5"
    assert "stage" not in rows[0]  # the same in all trials
    assert (tmp_path / "best").resolve() == tmp_path / "2"
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "4 trials, best by val/gold" in printed
    assert "failed: exit code 1" in printed


def test_the_best_trial_has_the_lowest_loss_or_the_highest_reward(tmp_path: Path) -> None:
    found = {}
    for metric in ("val/loss", "val/accuracy", "val/kl", "kl/reference", "reward/gold"):
        trials = made(
            tmp_path / metric.replace("/", "-"), [1.0, 2.0, 3.0], [{metric: 2.0}, {metric: 1.0}, {metric: math.nan}]
        )
        best = sweeps.best_trial(trials)
        assert best is not None
        found[metric] = best.number
    assert found == {"val/loss": 1, "val/accuracy": 0, "val/kl": 1, "kl/reference": 1, "reward/gold": 0}
    assert sweeps.best_trial(made(tmp_path / "none", [1.0], [None])) is None


def test_a_summary_without_a_finished_trial_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweeps.summarize(tmp_path, made(tmp_path, [1.0, 2.0], [None, None]))
    assert "failed: exit code 1" in capsys.readouterr().out
    assert not (tmp_path / "best").exists()


def test_a_trial_that_is_a_pipeline_is_judged_by_its_last_stage(tmp_path: Path) -> None:
    for name, value in (("0_sft", 1.0), ("2_b", 2.0), ("10_evaluate", 3.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({"gold": value}))
    assert sweeps.read_metrics(tmp_path) == {"gold": 3.0}


def test_the_same_command_has_the_same_folder() -> None:
    command = ["-m", "stage=sft", "optimizer.lr=1,2"]
    assert sweep_id(command) == sweep_id(
        ["stage=sft", "optimizer.lr=1,2", "resume=auto", "--multirun", "hydra.verbose=true"]
    )
    assert sweep_id(command) != sweep_id(["-m", "stage=sft", "optimizer.lr=1,3"])


@pytest.mark.parametrize(
    ("jobs", "devices", "number", "expected"),
    [
        (1, "0,1", 1, {}),
        (2, "", 1, {"OMP_NUM_THREADS": "4"}),
        (2, "4,5", 3, {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "5"}),
    ],
)
def test_trials_side_by_side_share_the_machine(
    monkeypatch: pytest.MonkeyPatch, jobs: int, devices: str, number: int, expected: dict[str, str]
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    hydra = OmegaConf.create({"launcher": {"_target_": "a.JoblibLauncher", "n_jobs": jobs}, "job": {"num": number}})
    cfg = OmegaConf.create({"trainer": {"devices": 1}})
    assert sweeps.shared_machine(cfg, hydra, {"CUDA_VISIBLE_DEVICES": devices}) == expected


# ---- real sweeps ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    lines = [{"prompt": f"Say {i}.", "response": f"It is {i}."} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def sweep(folder: Path, name: str, *more: str, code: int | None = 0) -> tuple[Any, Path]:
    data = ["data=demonstrations/jsonl", "data.train=rows.jsonl", "data.val=rows.jsonl", "max_steps=2"]
    done = rlhf(folder, "-m", "stage=sft", f"name={name}", *data, *SMALL, *more, code=code)
    return done, next((folder / "outputs" / "sweeps" / "sft" / name).iterdir())


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))


@pytest.mark.slow
def test_a_failed_trial_is_recorded_and_a_second_start_skips_what_is_done(rows: Path) -> None:
    done, folder = sweep(rows, "fails", "optimizer.lr=1e-3,1e30,1e-2", code=1)
    assert done.stderr.splitlines()[-1] == "rlhf: 1 of 3 trials failed: 1"
    found = table(folder)
    assert [row["status"].partition(":")[0] for row in found] == ["done", "failed", "done"]
    assert "not finite" in done.stderr
    losses = [float(row["val/loss"]) for row in found if row["val/loss"]]
    assert len(losses) == 2
    assert (folder / "best").resolve().name == ("0" if losses[0] < losses[1] else "2")
    written = [(folder / n / "metrics.json").stat().st_mtime_ns for n in "02"]
    again, same = sweep(rows, "fails", "optimizer.lr=1e-3,1e30,1e-2", code=1)
    assert same == folder
    assert again.stdout.count("already done") == 2
    assert [row["trial"] for row in table(folder)] == ["0", "1", "2"]
    assert (folder / "best").resolve().name == ("0" if losses[0] < losses[1] else "2")
    assert [(folder / n / "metrics.json").stat().st_mtime_ns for n in "02"] == written


@pytest.mark.slow
def test_a_failed_trial_may_stop_the_sweep(rows: Path) -> None:
    done, folder = sweep(rows, "stops", "optimizer.lr=1e30,1e-2", "on_failed_trial=stop", code=2)
    assert "trial 0 failed: exit code 2" in done.stderr
    assert [row["status"] for row in table(folder)] == ["failed: exit code 2"]


@pytest.mark.slow
@pytest.mark.dist
def test_two_trials_of_two_ranks(rows: Path) -> None:
    """Ranks are launched from the command line, which in a sweep would start the sweep again."""
    _, folder = sweep(rows, "ranks", "optimizer.lr=1e-3,1e-2", "strategy=ddp", "trainer.devices=2")
    assert [row["status"] for row in table(folder)] == ["done", "done"]
    for number in "01":
        assert len(list((folder / number).glob("*.log"))) == 2  # one a rank
        assert json.loads((folder / number / "metrics.json").read_text())["global_step"] == 2
    assert sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.is_symlink()) == ["0", "1"]


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_trials_by_other_launchers(rows: Path, launcher: str) -> None:
    beside = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else ["hydra.launcher.timeout_min=5"]
    _, folder = sweep(rows, launcher, "seed=0,1", f"hydra/launcher={launcher}", *beside)
    assert [row["status"] for row in table(folder)] == ["done", "done"]
    assert (folder / "best" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_optuna_goes_on_after_a_failed_trial(rows: Path) -> None:
    _, folder = sweep(
        rows, "random", "hydra/sweeper=optuna", "hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=0",
        "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1", "hydra.sweeper.max_failure_rate=1.0",
        "hydra.sweeper.direction=minimize", "optimizer.lr=choice(1e-3,1e30)", code=1,
    )  # fmt: skip
    assert [row["status"].partition(":")[0] for row in table(folder)] == ["failed", "done"]


@pytest.mark.slow
def test_a_grid_that_no_seed_fixes_is_refused(rows: Path) -> None:
    more = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "optimizer.lr=choice(1e-3,1e-2)"]
    done = rlhf(rows, "-m", "stage=sft", "data=demonstrations/jsonl", "data.train=rows.jsonl", *more, code=None)
    assert done.returncode == 2
    assert "leave hydra/sweeper=optuna out" in done.stderr


@pytest.mark.slow
@pytest.mark.nightly
def test_optuna_reads_two_objectives(rows: Path) -> None:
    _, folder = sweep(
        rows, "optuna", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.direction=[minimize,maximize]", "objectives=[val/loss,perf/rows_per_s]",
        "hydra.sweeper.sampler.seed=0", "optimizer.lr=interval(0.001,0.01)",
    )  # fmt: skip
    found = table(folder)
    assert [row["status"] for row in found] == ["done", "done"]
    assert len({row["optimizer.lr"] for row in found}) == 2
    best = (folder / "optimization_results.yaml").read_text()
    assert "multi-objective_optimization" in best or "solutions" in best


def records(folder: Path) -> dict[str, Any]:
    """Return what the HParams tab reads in a folder: its records and the last values of scalars, by tag."""
    events = EventAccumulator(str(folder)).Reload()
    found: dict[str, Any] = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    for tag, metadata in events.summary_metadata.items():
        if tag.startswith("_hparams_"):
            found[tag] = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
    return found


@pytest.mark.slow
@pytest.mark.nightly
def test_a_beta_sweep_measures_the_frontier(tmp_path: Path) -> None:
    rlhf(tmp_path, "stage=sft", "data=world", "data.world.rows=200", "debug=fast", "name=start", *SMALL)
    start = next((tmp_path / "outputs" / "sft" / "start").iterdir()) / "model"
    given = ["debug=fast", "pipeline.stages.evaluate.set.evaluate.rows=4", "+pipeline.stages.dpo.set.dpo.beta=0.1,0.5"]
    done = rlhf(tmp_path, "-m", "sweep=dpo_beta", f"init_from={start}", *given)
    assert "2 trials, best by gold" in done.stdout
    (table,) = (tmp_path / "outputs" / "sweeps").rglob("sweep.csv")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["pipeline.stages.dpo.set.dpo.beta"] for row in rows] == ["0.1", "0.5"]
    assert all(float(row["kl"]) >= -1 and row["gold"] for row in rows)
    tab = records(table.parent)["_hparams_/experiment"].experiment
    assert [info.name for info in tab.hparam_infos] == ["dpo.beta"]
    assert [info.name.tag for info in tab.metric_infos] == ["sweep/gold", "sweep/kl"]
    for row in rows:
        found = records(table.parent / row["trial"] / "0_dpo" / "tensorboard")
        assert found["_hparams_/session_start_info"].session_start_info.hparams["dpo.beta"].number_value > 0
        assert "_hparams_/experiment" not in found
        assert found["sweep/kl"] == pytest.approx(float(row["kl"]))
    parents = [json.loads((table.parent / n / "0_dpo/model/manifest.json").read_text())["parents"] for n in "01"]
    assert [[parent["folder"] for parent in found] for found in parents] == [[str(start)], [str(start)]]
    failed = rlhf(tmp_path, "-m", "sweep=dpo_beta", "debug=fast", "on_failed_trial=stop", code=2)
    assert "init_from" in failed.stderr
