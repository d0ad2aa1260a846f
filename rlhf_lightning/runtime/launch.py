"""Starting ranks: the arguments, plugins and run folder of each, under Lightning, torchrun and SLURM."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf_lightning.distributed import agreed, ranks
from rlhf_lightning.errors import UserError
from rlhf_lightning.runtime.run_folder import find_run, remove_start


def arguments_of_rank(arguments: list[str]) -> list[str]:
    """Return what to add to the command line of this rank, and give all ranks one run id.

    Further ranks write no `.hydra` of their own and a log of their own.

    Raises:
        UserError: a sweep, whose trials start their own ranks.
    """
    launched = ranks()
    if launched is None:
        return []
    is_sweep = {"-m", "--multirun"} & set(arguments) or any(a.startswith("sweep=") for a in arguments)
    if any(a.startswith("pipeline=") for a in arguments):
        raise UserError("start a pipeline without torchrun or srun: every stage launches its own ranks")
    if is_sweep and "hydra.mode=RUN" not in arguments:
        raise UserError("start a sweep without torchrun or srun: every trial launches its own ranks")
    now = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    os.environ["RLHF_RUN_ID"] = agreed("run_id", lambda: os.environ.get("RLHF_RUN_ID", now))
    return [f"hydra.job.name=run_rank{launched[0]}", "hydra.output_subdir=null"] if launched[0] else []


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
    """Return the number of ranks that the settings of a Trainer ask for, None where it depends on the machine."""
    devices = trainer["devices"]
    if not isinstance(devices, list) and not str(devices).isdigit():
        return None
    return (len(devices) if isinstance(devices, list) else int(devices)) * trainer["num_nodes"]


def check_devices(trainer: dict[str, Any]) -> None:
    """Raise a UserError when the settings ask for another number of ranks than were started."""
    launched, expected = ranks(), ranks_asked(trainer)
    if launched is not None and expected is not None and launched[1] != expected:
        raise UserError(
            f"{launched[1]} ranks were started, but trainer.devices times trainer.num_nodes is {expected}; "
            "make them equal"
        )
    if launched is None and trainer["num_nodes"] > 1 and os.environ.get("SLURM_NTASKS") == "1":
        raise UserError(
            f"trainer.num_nodes={trainer['num_nodes']} in a SLURM job of one task; ask for one task per device, with "
            "--nodes and --ntasks-per-node, and start it with srun"
        )


def of_first_rank(name: str, decide: Callable[[], str]) -> str:
    """Return what the first rank decides: ranks that Lightning launches inherit its environment, others ask for it."""
    from lightning.pytorch.utilities import rank_zero_only  # heavy, and the command imports this file

    variable = f"RLHF_{name.upper()}"
    if rank_zero_only.rank > 0 and variable in os.environ:
        return os.environ[variable]
    os.environ[variable] = agreed(name, decide)
    return os.environ[variable]


def decide_run(
    run: Path, stage: str, output: str | None, resume: str | None, digest: str
) -> tuple[Path, Path | None, dict[str, Any] | None]:
    """Return what :func:`find_run` finds on the first rank; every other rank inherits the decision.

    Ranks that Lightning launches read it from their environment, ranks of torchrun and SLURM from the store.
    """
    from lightning.pytorch.utilities import rank_zero_only  # heavy, and the command imports this file

    if rank_zero_only.rank > 0 and "RLHF_RUN" in os.environ:
        checkpoint = os.environ["RLHF_CHECKPOINT"]
        return Path(os.environ["RLHF_RUN"]), Path(checkpoint) if checkpoint else None, None

    def decide() -> str:
        place, checkpoint, finished = find_run(run, stage, output, resume, digest)
        return json.dumps([str(place), str(checkpoint or ""), finished])

    place, checkpoint, finished = json.loads(agreed("run", decide))
    if Path(place) != run:
        remove_start(run)
    os.environ |= {"RLHF_RUN": place, "RLHF_CHECKPOINT": checkpoint}
    return Path(place), Path(checkpoint) if checkpoint else None, finished
