"""What ranks that torchrun or SLURM starts must agree on before they can talk: one run id, one run folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_lightning import artifacts
from rlhf_lightning.errors import UserError

WAIT = 600.0  # seconds that ranks wait for each other


def ranks() -> tuple[int, int] | None:
    """Return this rank and their number where a launcher outside of this program starts them, else None."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"])
    if (
        int(env.get("SLURM_NTASKS", "1")) > 1
        and "SLURM_PROCID" in env
        and env.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    ):
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
    return None


@cache
def store() -> Any:
    """Return the key-value store of the ranks: torchrun's own, or one that the first SLURM task serves."""
    from datetime import timedelta

    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    found = ranks()
    assert found is not None
    waiting = timedelta(seconds=WAIT)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=waiting)
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    try:
        environment = SLURMEnvironment()
    except RuntimeError as error:  # it wants --ntasks-per-node instead of --ntasks
        raise UserError(str(error)) from error
    port = environment.main_port + 10_000  # beyond the range of ports that Lightning takes for process groups
    return TCPStore(environment.main_address, port, is_master=found[0] == 0, wait_for_workers=False, timeout=waiting)


def agreed(key: str, decide: Callable[[], str]) -> str:
    """Return what the first rank decides; where nobody else was started, that is us.

    Raises:
        UserError: on every rank, when `decide` raised one on the first, or the first one is gone.
    """
    found = ranks()
    if found is None:
        return decide()
    from torch.distributed import DistError

    key = f"rlhf/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{key}"
    try:
        if found[0] == 0:
            try:
                told = {"value": decide()}
            except UserError as error:
                told = {"error": str(error)}
            store().set(key, json.dumps(told))
            # the store may live in this process, which must not end before all have read
            for rank in range(1, found[1]):
                store().get(f"{key}/{rank}")
        else:
            told = json.loads(store().get(key))
            store().set(f"{key}/{found[0]}", "read")
    except DistError as error:
        raise UserError(
            f"the {found[1]} ranks did not meet: one has ended, and its own message says why, or was not started "
            f"within {WAIT:.0f} seconds (srun starts the tasks of a SLURM job)"
        ) from error
    if "error" in told:
        raise UserError(told["error"])
    return told["value"]


def is_lost_peer(error: Exception) -> bool:
    """Return whether `error` is what a rank sees when another one has ended or cannot be reached."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
    several = "MASTER_ADDR" in os.environ  # which Lightning and torchrun set
    return several and isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def arguments_of_rank(arguments: list[str]) -> list[str]:
    """Return what to add to the command line of this rank, and give all ranks one run id.

    Further ranks write no `.hydra` of their own and a log of their own.

    Raises:
        UserError: a sweep, whose trials start their own ranks.
    """
    found = ranks()
    if found is None:
        return []
    given = {"-m", "--multirun"} & set(arguments) or any(a.startswith("sweep=") for a in arguments)
    if any(a.startswith("pipeline=") for a in arguments):
        raise UserError("start a pipeline with the plain command: every stage launches its own ranks")
    if given and "hydra.mode=RUN" not in arguments:
        raise UserError("start a sweep with the plain command: every trial launches its own ranks")
    now = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    os.environ["RLHF_RUN_ID"] = agreed("run_id", lambda: os.environ.get("RLHF_RUN_ID", now))
    return [f"hydra.job.name=run_rank{found[0]}", "hydra.output_subdir=null"] if found[0] else []


def environment() -> list[Any]:
    """Return the Trainer's plugins under SLURM, elsewhere none.

    A job of one task launches its ranks itself like a workstation. A job is not requeued by Lightning, which would
    save in the middle of a step.
    """
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    if "TORCHELASTIC_RUN_ID" in os.environ or not SLURMEnvironment.detect():
        return []
    return [SLURMEnvironment(auto_requeue=False) if ranks() else LightningEnvironment()]


def ranks_asked(trainer: dict[str, Any]) -> int | None:
    """Return the number of ranks that the settings of a Trainer ask for, None where it is found out at the start."""
    asked = trainer["devices"]
    if not isinstance(asked, list) and not str(asked).isdigit():
        return None
    return (len(asked) if isinstance(asked, list) else int(asked)) * trainer["num_nodes"]


def check_devices(trainer: dict[str, Any]) -> None:
    """Raise a UserError when the settings ask for another number of ranks than were started."""
    found, asked = ranks(), ranks_asked(trainer)
    if found is not None and asked is not None and found[1] != asked:
        raise UserError(
            f"{found[1]} ranks were started, but trainer.devices times trainer.num_nodes is {asked}; make them equal"
        )
    if found is None and trainer["num_nodes"] > 1 and os.environ.get("SLURM_NTASKS") == "1":
        raise UserError(
            f"trainer.num_nodes={trainer['num_nodes']} in a SLURM job of one task; ask for one task a device, with "
            "--nodes and --ntasks-per-node, and start it with srun"
        )


def decide_run(
    run: Path, stage: str, resume: str | None, digest: str
) -> tuple[Path, Path | None, dict[str, Any] | None]:
    """Return what :func:`artifacts.find_run` finds on the first rank; every other rank inherits the decision.

    Ranks that Lightning launches find it in their environment, ranks of torchrun and SLURM ask for it.
    """
    from lightning.pytorch.utilities import rank_zero_only  # heavy, and the command imports this file

    if rank_zero_only.rank > 0 and "RLHF_RUN" in os.environ:
        checkpoint = os.environ["RLHF_CHECKPOINT"]
        return Path(os.environ["RLHF_RUN"]), Path(checkpoint) if checkpoint else None, None

    def decide() -> str:
        place, checkpoint, finished = artifacts.find_run(run, stage, resume, digest)
        return json.dumps([str(place), str(checkpoint or ""), finished])

    place, checkpoint, finished = json.loads(agreed("run", decide))
    if Path(place) != run:
        artifacts.remove_start(run)
    os.environ |= {"RLHF_RUN": place, "RLHF_CHECKPOINT": checkpoint}
    return Path(place), Path(checkpoint) if checkpoint else None, finished


def data_ranks(trainer: Any) -> tuple[int, int]:
    """Return the number of ranks that read different rows, and this one's place among them."""
    found = getattr(trainer.strategy, "distributed_sampler_kwargs", None)  # strategies of one device have none
    return (found["num_replicas"], found["rank"]) if found else (1, 0)
