"""Ranks: who they are, what they must agree on before they can talk, and which of them read different rows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from typing import Any

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


def data_ranks(trainer: Any) -> tuple[int, int]:
    """Return this process's rank among those that read different rows, and their number."""
    kwargs = getattr(trainer.strategy, "distributed_sampler_kwargs", None)  # strategies of one device have none
    return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)
