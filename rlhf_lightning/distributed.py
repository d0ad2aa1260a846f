"""Ranks: their numbers, decisions they share before the process group exists, and which of them read different rows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from typing import Any

from rlhf_lightning.errors import UserError

WAIT = 600.0  # rendezvous timeout in seconds


def ranks() -> tuple[int, int] | None:
    """Return (rank, world size) where torchrun or SLURM started the ranks, else None."""
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

    launched = ranks()
    assert launched is not None
    timeout = timedelta(seconds=WAIT)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    try:
        environment = SLURMEnvironment()
    except RuntimeError as error:  # it wants --ntasks-per-node instead of --ntasks
        raise UserError(str(error)) from error
    port = environment.main_port + 10_000  # above the ports that Lightning uses for process groups
    return TCPStore(environment.main_address, port, is_master=launched[0] == 0, wait_for_workers=False, timeout=timeout)


def agreed(key: str, decide: Callable[[], str]) -> str:
    """Return what rank 0 decides; a process without other ranks decides itself.

    Raises:
        UserError: on every rank, when `decide` raised one on rank 0, or when the rendezvous fails.
    """
    launched = ranks()
    if launched is None:
        return decide()
    rank, world_size = launched
    from torch.distributed import DistError

    key = f"rlhf/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{key}"
    try:
        if rank == 0:
            try:
                decision = {"value": decide()}
            except UserError as error:
                decision = {"error": str(error)}
            store().set(key, json.dumps(decision))
            # the store may live in this process, which must not end before all have read
            for other in range(1, world_size):
                store().get(f"{key}/{other}")
        else:
            decision = json.loads(store().get(key))
            store().set(f"{key}/{rank}", "read")
    except DistError as error:
        raise UserError(
            f"rendezvous of {world_size} ranks failed: a rank exited (its own message says why) or was not started "
            f"within {WAIT:.0f} seconds (srun starts the tasks of a SLURM job)"
        ) from error
    if "error" in decision:
        raise UserError(decision["error"])
    return decision["value"]


def gather_objects(value: Any) -> list[Any]:
    """Return `value` of every rank of the process group, without one this process's; ranks wait for each other."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def is_first_rank() -> bool:
    """Return whether this process is the first of its process group, or has none."""
    from torch import distributed

    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())


def on_first_rank(call: Callable[[], Any]) -> Any:
    """Return what a call on the first rank of the process group returns, on every rank, once all have come here.

    Raises:
        UserError: on every rank, when the call raised one.
    """
    gather_objects(None)
    outcome: tuple[Any, str | None] = None, None
    if is_first_rank():
        try:
            outcome = call(), None
        except UserError as error:
            outcome = None, str(error)
    result, problem = gather_objects(outcome)[0]
    if problem is not None:
        raise UserError(problem)
    return result


def is_lost_peer(error: Exception) -> bool:
    """Return whether `error` is what a rank raises when another rank has exited or cannot be reached."""
    messages = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
    distributed = "MASTER_ADDR" in os.environ  # which Lightning and torchrun set
    return distributed and isinstance(error, RuntimeError) and any(message in str(error) for message in messages)


def data_ranks(trainer: Any) -> tuple[int, int]:
    """Return this process's rank among those that read different rows, and their number."""
    kwargs = getattr(trainer.strategy, "distributed_sampler_kwargs", None)  # strategies of one device have none
    return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)
