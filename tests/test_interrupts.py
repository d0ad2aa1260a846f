"""A run that is killed at any moment goes on as if it had not been, and two processes do not share a folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from rlhf_lightning.errors import UserError
from rlhf_lightning.files import build_once, lock
from rlhf_lightning.runtime.run_folder import find_run, occupy
from rlhf_lightning.runtime.sweeps import SweepSummary
from tests.helpers.cli import SMALL, environment, rlhf

ENDS = """
import os, signal
from pathlib import Path
from lightning.pytorch import Callback

class Ends(Callback):
    '''Ends the process once, at a moment after the last update.'''

    def end(self):
        if number := int(os.environ.get("SIGNAL", "0")):
            os.kill(os.getpid(), number)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        if trainer.state.fn == "validate" and os.environ.get("WHERE") == "validation":
            self.end()

    def teardown(self, trainer, module, stage):
        if stage == "validate" and os.environ.get("WHERE") == "export":
            self.end()
"""
RUN = [
    "experiment=sft_world", "data.train_rows=8", "data.val_rows=8", "data.batch_size=4", "max_steps=3",
    "max_epochs=-1", "val_every_n_steps=100", "callbacks.samples=null", "allow_targets=[ends.Ends]",
    "+callbacks.ends._target_=ends.Ends", "model=tiny", *SMALL,
]  # fmt: skip


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlhf_lightning", *RUN, *arguments]
    env = environment(folder, **variables)
    env["PYTHONPATH"] = os.pathsep.join([str(folder), str(Path(__file__).parents[1])])
    return subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing ended."""
    folder = tmp_path_factory.mktemp("interrupts")
    (folder / "ends.py").write_text(ENDS)
    done = start(folder, "name=whole")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "number", "code"),
    [
        pytest.param("validation", signal.SIGINT, 130, marks=pytest.mark.nightly),
        pytest.param("export", signal.SIGTERM, 143, marks=pytest.mark.nightly),
        pytest.param("export", signal.SIGKILL, -9, marks=pytest.mark.nightly),
    ],
)
def test_a_run_that_ends_after_its_last_update_goes_on_with_its_metrics(
    where: str, number: int, code: int, whole: Path
) -> None:
    name = f"name={where}{code}"
    cut = start(whole, name, SIGNAL=str(int(number)), WHERE=where)
    assert cut.returncode == code, cut.stderr
    if code > 0:
        assert cut.stderr.splitlines()[-1] == "rlhf: interrupted; add resume=auto to the same command to continue"
    runs = whole / "outputs" / "sft"
    (run,) = (runs / name[5:]).iterdir()
    assert not (run / "model").exists()
    (run / ".model.abc.tmp").mkdir()  # as if killed while it was written
    (run / "checkpoints" / ".last.ckpt.abc.tmp").touch()
    again = start(whole, name, "resume=auto")
    assert again.returncode == 0, again.stderr
    assert "resuming at step 3" in again.stdout
    assert [path.name for path in (runs / name[5:]).iterdir()] == [run.name]
    assert not [path for path in run.rglob("*") if ".tmp" in path.name]
    (expected,) = (runs / "whole").iterdir()
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (expected, run)]
    assert metrics[0].keys() == metrics[1].keys()
    assert "train/loss" in metrics[0]
    exact = [{k: v for k, v in found.items() if not k.startswith("perf/")} for found in metrics]
    assert exact[0] == exact[1]
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (expected, run)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


# ---- run folders ---------------------------------------------------------------------------------------------------


def in_another_process(function: Any, *arguments: Any) -> Any:
    """Return what a function returns, or the message of what it raises, in another process."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        try:
            return pool.apply(function, arguments)
        except UserError as error:
            return str(error)


def test_a_stage_ends_with_the_pipeline_that_is_killed(tmp_path: Path) -> None:
    """It gets SIGTERM, on which runs save; a pipeline that is still there lets it be."""
    child = "import time; from rlhf_lightning.runtime.processes import end_with_parent as end; end(); time.sleep(60)"
    parent = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], env=os.environ | {{'RLHF_PARENT': str(os.getpid())}})\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    env = environment(tmp_path) | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", parent], env=env, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        child_ends = os.pidfd_open(int(started.stdout.readline()))
        assert not select.select([child_ends], [], [], 3)[0]
        started.kill()
    assert select.select([child_ends], [], [], 20)[0]
    os.close(child_ends)


def test_the_second_process_in_a_run_folder_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert find_run(run, "sft", "model", None, "a") == (run, None, None)
    told = in_another_process(find_run, run, "sft", "model", "here", "a")
    assert told.startswith(f"{run} is in use by process {os.getpid()} on ")
    found = in_another_process(find_run, tmp_path / "later", "sft", "model", "auto", "a")
    assert found.startswith(f"{run} is in use by process {os.getpid()} on ")


def test_a_lock_ends_with_its_process_and_is_not_that_of_its_children(tmp_path: Path) -> None:
    assert in_another_process(lock, tmp_path / "a") is None
    assert in_another_process(lock, tmp_path / "a") is None
    assert lock(tmp_path / "a") is None
    assert lock(tmp_path / "a") is None  # this process has it
    assert in_another_process(lock, tmp_path / "a") is not None
    assert in_another_process(lock, tmp_path / "a") is not None  # the child that looked did not end it


def test_a_finished_run_is_told_about_while_another_process_looks_at_it(tmp_path: Path) -> None:
    find_run(tmp_path / "run", "sft", "done", None, "a")
    (tmp_path / "run" / "done").touch()
    (tmp_path / "run" / "metrics.json").write_text("{}")
    found = in_another_process(find_run, tmp_path / "run", "sft", "done", "here", "a")
    assert found == (tmp_path / "run", None, {})


def test_the_second_process_in_a_sweep_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "sweep")}}})
    SweepSummary().on_multirun_start(config)

    def second() -> None:
        SweepSummary().on_multirun_start(config)

    child = multiprocessing.get_context("fork").Process(target=second)
    child.start()
    child.join()
    assert child.exitcode == 2
    assert f"rlhf: {tmp_path / 'sweep'} is in use by process {os.getpid()}" in capfd.readouterr().err


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = [".hydra", "checkpoints", "model", ".model.tmp", "notes.tmp"]
    for name in [".model.x1.tmp", ".model.x1.tmp.old", *kept]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".metrics.json.x2.tmp").touch()
    (tmp_path / "checkpoints" / ".last.ckpt.x3.tmp").touch()
    occupy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, ".lock"])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["file"]


def test_what_a_killed_process_left_in_a_cache_is_removed_when_it_is_built_again(tmp_path: Path) -> None:
    """Half a converted model may be large, and no name says later what it was for."""
    for name in (".model-1.abc.tmp", ".model-12.abc.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".model-1.lock").touch()
    build_once(tmp_path / "model-1", lambda folder: (folder / "file").touch())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model-12.abc.tmp", "model-1"]


@pytest.mark.slow
@pytest.mark.nightly
def test_a_pipeline_that_goes_on_leaves_no_other_folder(tmp_path: Path) -> None:
    stages = ["pipeline=demo", "debug=fast", "+pipeline.stages.base.set.data.world.rows=200", *SMALL]
    failing = "~pipeline.stages.sft", "~pipeline.stages.reward", "~pipeline.stages.ppo", "~pipeline.stages.dpo"
    arguments = [*stages, *failing, "~pipeline.stages.evaluate"]
    rlhf(tmp_path, *arguments)
    (run,) = (tmp_path / "outputs" / "pipelines" / "demo").iterdir()
    base = run / "0_base"
    made = (base / "model" / "model.safetensors").stat().st_mtime_ns
    (base / "metrics.json").unlink()  # as if killed between its two last files
    again = rlhf(tmp_path, *arguments, "resume=auto").stdout
    assert "base is done" not in again
    assert (base / "model" / "model.safetensors").stat().st_mtime_ns > made
    assert "base is done" in rlhf(tmp_path, *arguments, "resume=auto").stdout
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    assert sorted(path.name for path in run.glob("0_*")) == ["0_base"]
    assert lock(run / ".lock") is None  # nobody has it any more
    told = rlhf(tmp_path, *arguments, "resume=auto", code=2)
    assert f"{run} is in use by process {os.getpid()}" in told.stderr.replace("\n", " ")
    assert [path.name for path in run.parent.iterdir()] == [run.name]
