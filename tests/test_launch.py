"""Ranks that torchrun or SLURM starts: one run folder, one log a rank, the weights of one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_lightning import distributed
from rlhf_lightning.errors import UserError
from rlhf_lightning.runtime import launch
from tests.helpers.cli import SMALL, environment, fork_server, rlhf

STEP = ["stage=sft", "data=demonstrations/jsonl", "data.train=rows.jsonl", "max_steps=2", "data.batch_size=8", *SMALL]
TWO = ["trainer.devices=2", "strategy=ddp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    rows = [{"prompt": f"Say {i}.", "response": f"It is {i}."} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def torchrun(
    folder: Path, *arguments: str, launcher: tuple[str, ...] = ("--nproc-per-node=2",)
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *launcher,
        f"--master-port={free_port()}",
        "-m",
        "rlhf_lightning",
    ]
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment(folder), text=True, capture_output=True, timeout=200
    )


def check(folder: Path, name: str, other: str = "run_rank1.log") -> None:
    """One run folder, a log a rank, one model: that of one process."""
    (run,) = (folder / "outputs" / "sft" / name).iterdir()
    assert sorted(path.name for path in run.glob("*.log")) == ["run.log", other]
    if not (folder / "outputs" / "sft" / "alone").exists():
        rlhf(folder, *STEP, "name=alone")
    (alone,) = (folder / "outputs" / "sft" / "alone").iterdir()
    expected, found = (load_file(r / "model" / "model.safetensors") for r in (alone, run))
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-5, atol=2e-6, msg=key)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.nightly
def test_torchrun(folder: Path) -> None:
    done = torchrun(folder, *STEP, *TWO, "name=torchrun")
    assert done.returncode == 0, done.stderr[-3000:]
    check(folder, "torchrun")
    again = torchrun(folder, *STEP, *TWO, "name=torchrun", "resume=auto")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "already done" in again.stdout
    assert len(list((folder / "outputs" / "sft" / "torchrun").iterdir())) == 1


def slurm_job(tasks: int) -> dict[str, str]:
    """Return the variables that SLURM gives to every task of a job on one node."""
    return {
        "SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NAME": "rlhf", "SLURM_NTASKS": str(tasks),
        "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1",
        "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1",
    }  # fmt: skip


def slurm(folder: Path, *arguments: str) -> tuple[list[int], str]:
    """Run the two tasks of a job as SLURM would start them; return their exit codes and what they said."""
    job = slurm_job(2)
    with tempfile.TemporaryFile("w+") as said:
        started = [
            fork_server().start(
                arguments,
                folder,
                environment(folder, **job, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
                said,
                said,
            )
            for rank in range(2)
        ]
        codes = [rank.wait() for rank in started]
        said.seek(0)
        return codes, said.read()


@pytest.mark.slow
@pytest.mark.dist
def test_the_tasks_of_a_slurm_job(folder: Path) -> None:
    codes, said = slurm(folder, *STEP, *TWO, "name=slurm")
    assert codes == [0, 0], said[-3000:]
    check(folder, "slurm")
    codes, said = slurm(folder, *STEP, *TWO, "name=slurm", "resume=auto")
    assert codes == [0, 0], said[-3000:]
    assert "already done" in said


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.dist
def test_a_slurm_job_of_one_task_launches_its_own_ranks(folder: Path) -> None:
    """In interpreters of their own, the launched rank too."""
    job = environment(folder, **slurm_job(1), SLURM_PROCID="0", SLURM_LOCALID="0")
    command = [sys.executable, "-m", "rlhf_lightning", *STEP, *TWO, "name=task"]
    done = subprocess.run(command, cwd=folder, env=job, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    check(folder, "task", "train_ddp_process_1.log")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["resume=nowhere"], "there is no checkpoint nowhere"),
        pytest.param(["stage=ppo", "reward_from=world"], "needs a model to start from", marks=pytest.mark.nightly),
    ],
)
def test_a_mistake_ends_every_task_with_its_message(wrong: list[str], message: str, folder: Path) -> None:
    """Also one that only the first task finds, which holds the store that the other one asks."""
    codes, said = slurm(folder, *STEP, *TWO, "name=mistake", *wrong)
    assert codes == [2, 2], said[-3000:]
    assert said.count(message) == 2
    assert "Traceback" not in said


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.dist
def test_another_number_of_ranks_than_configured_is_refused(folder: Path) -> None:
    done = torchrun(folder, *STEP, "name=wrong")
    assert done.returncode != 0
    assert "2 ranks were started, but trainer.devices times trainer.num_nodes is 1" in done.stderr


def test_a_sweep_is_not_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "ranks", lambda: (1, 2))
    with pytest.raises(UserError, match="without torchrun or srun"):
        launch.arguments_of_rank(["-m", "stage=sft"])
    with pytest.raises(UserError, match="without torchrun or srun"):
        launch.arguments_of_rank(["sweep=dpo_beta"])


@pytest.mark.parametrize(
    ("error", "several", "expected"),
    [
        (RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:4711"), True, True),
        (RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:4711"), False, False),
        (RuntimeError("the size of tensor a must match"), True, False),
        (ConnectionResetError("Connection reset by peer"), True, False),
    ],
)
def test_a_lost_rank_is_told_from_other_errors(
    error: Exception, several: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    if several:
        monkeypatch.setenv("MASTER_ADDR", "host0")
    assert distributed.is_lost_peer(error) == expected


def test_several_nodes_need_a_task_a_device() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_NTASKS", "1")
        with pytest.raises(UserError, match="--ntasks-per-node"):
            launch.check_devices({"devices": 8, "num_nodes": 2})
        launch.check_devices({"devices": 8, "num_nodes": 1})


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.nightly
def test_a_task_that_nobody_starts_is_missed(folder: Path) -> None:
    code = "import rlhf_lightning.distributed as distributed, rlhf_lightning.__main__ as program; distributed.WAIT = 2.0; program.main()"
    lonely = environment(
        folder, SLURM_JOB_ID=str(free_port()), SLURM_JOB_NAME="rlhf", SLURM_NTASKS="2", SLURM_PROCID="0",
        SLURM_NODELIST="127.0.0.1", SLURM_NTASKS_PER_NODE="2",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *STEP, *TWO], cwd=folder, env=lonely, text=True, capture_output=True, timeout=100
    )
    assert done.returncode == 2
    assert "srun" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plain_start_agrees_with_itself() -> None:
    assert launch.ranks() is None
    assert launch.agreed("key", lambda: "mine") == "mine"
    assert launch.arguments_of_rank(["-m", "stage=sft"]) == []


@pytest.mark.parametrize(("devices", "expected"), [(2, 4), ("2", 4), ([0, 3, 5], 6), ("auto", None), (-1, None)])
def test_how_many_ranks_a_trainer_asks_for(devices: object, expected: int | None) -> None:
    assert launch.ranks_asked({"devices": devices, "num_nodes": 2}) == expected


# ---- two machines --------------------------------------------------------------------------------------------------


@pytest.fixture
def machines() -> object:
    """Two network namespaces joined by a cable, as two hosts would be."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    names = [f"rlhf{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "va", "netns", names[0], "type", "veth", "peer", "name", "vb", "netns", names[1])
        for name, link, address in zip(names, ("va", "vb"), ("10.77.0.1/24", "10.77.0.2/24"), strict=True):
            ip("-n", name, "addr", "add", address, "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
@pytest.mark.dist
def test_two_machines_by_torchrun(folder: Path, machines: list[str]) -> None:
    port = free_port()
    two = ["trainer.devices=1", "trainer.num_nodes=2", "strategy=ddp"]
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}",
             "--nproc-per-node=1", "--master-addr=10.77.0.1", f"--master-port={port}", "-m", "rlhf_lightning", *STEP, *two,
             "name=machines"],
            cwd=folder, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            env=environment(folder, GLOO_SOCKET_IFNAME=link),
        )
        for rank, (name, link) in enumerate(zip(machines, ("va", "vb"), strict=True))
    ]  # fmt: skip
    errors = [machine.communicate(timeout=200)[1] for machine in started]
    assert [machine.returncode for machine in started] == [0, 0], re.sub(r"\s+", " ", "".join(errors))[-3000:]
    check(folder, "machines")
