"""Run folders: started once, found again by what decides their result, finished when their output is there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlhf_lightning.distributed import agreed
from rlhf_lightning.errors import UserError
from rlhf_lightning.files import lock, read_json, readable_os_errors, remove_temporaries

LOCK = ".lock"


class RunFolder(Callback):
    """Hydra calls it before it makes the folder of a run: of runs that start in one second each gets its own."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if any(override.startswith("hydra.run.dir=") for override in config.hydra.overrides.hydra):
            return  # the user's choice, and that of a process that starts this one
        with suppress(OmegaConfBaseException):  # reported when the configuration is resolved
            config.run_id = agreed("run_folder", lambda: reserve(config))


def reserve(config: DictConfig) -> str:
    """Make the run folder, whose name no other run has, and return the run id in its name."""
    first, taken = str(config.run_id), None
    for number in count(2):
        folder = Path(config.hydra.run.dir)
        if folder == taken:  # a folder of the user's, without the run id
            break
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            break
        except FileExistsError:
            taken, config.run_id = folder, f"{first}_{number}"
        except OSError:  # reported when the run writes there
            break
    return str(config.run_id)


def find_run(
    run: Path, stage: str, output: str | None, resume: str | None, digest: str
) -> tuple[Path, Path | None, dict[str, Any] | None]:
    """Return the run folder, the checkpoint to resume from, and the metrics when the run is already finished.

    With resume=here it is this folder, with resume=auto this one or the newest sibling of the same configuration. A run
    is finished when `output` is in its folder; one whose stage has none never is. This process has the folder of an
    unfinished run for itself, and what a killed one left half written there is removed.

    Raises:
        UserError: another process is in the folder, it holds another run, or there is nothing to resume from.
    """
    folder, checkpoint, finished = _find_run(run, stage, output, resume, digest)
    if finished is None:
        occupy(folder)
    return folder, checkpoint, finished


def _find_run(
    run: Path, stage: str, output: str | None, resume: str | None, digest: str
) -> tuple[Path, Path | None, dict[str, Any] | None]:
    mine = {"fingerprint": digest, "stage": stage, "output": output}
    started = read_json(run / "run.json")
    if resume is None:
        claim(run, mine)
        return run, None, None
    if resume not in ("auto", "here"):
        path = Path(resume)
        path = path if path.suffix == ".ckpt" else path / "checkpoints" / "last.ckpt"
        if not path.is_file():
            raise UserError(f"resume={resume}: there is no checkpoint {path}; use resume=auto or a run folder")
        other = (read_json(path.parents[1] / "run.json") or {}).get("stage", stage)
        if other != stage:
            raise UserError(f"resume={resume} is a run of stage={other}, not of stage={stage}")
        claim(run, mine)
        return run, path, None
    if started and started.get("fingerprint") != digest:
        raise UserError(
            f"{run} was started with another configuration or other models; choose another folder for a new run"
        )
    siblings = sorted((p for p in run.parent.iterdir() if p != run), reverse=True) if resume == "auto" else []
    for folder in [run, *siblings]:
        record = read_json(folder / "run.json") if folder.is_dir() else None
        if record is None or record.get("fingerprint") != digest:
            continue
        if folder != run and not started:
            remove_start(run)
        checkpoint = folder / "checkpoints" / "last.ckpt"
        finished = output is not None and (folder / output).is_file()
        metrics = read_json(folder / "metrics.json") if finished else None
        return folder, checkpoint if checkpoint.is_file() else None, metrics
    claim(run, mine)
    return run, None, None


def occupy(folder: Path) -> None:
    """Have a run folder for this process, or raise a UserError when another has it; remove what a killed one left."""
    with readable_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if holder := lock(folder / LOCK):
            raise UserError(
                f"{folder} is in use by {holder}; wait until it ends, or start another run with name=<another name>"
            )
        for place in (folder, folder / "checkpoints", folder / "samples", folder / "shards"):
            remove_temporaries(place)


def claim(run: Path, value: dict[str, Any]) -> None:
    """Write `run.json`, or raise a UserError when another run has claimed the folder."""
    with readable_os_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=run, prefix=".run.json.", suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            json.dump(value, opened)
        try:
            os.link(name, run / "run.json")  # atomic: fails when it exists
        except FileExistsError:
            raise UserError(
                f"{run} already holds a run; add resume=auto to continue it, or choose another folder"
            ) from None
        finally:
            os.unlink(name)


def remove_start(run: Path) -> None:
    """Remove what Hydra wrote for a start that continues another run, and the folder when nothing else is in it."""
    shutil.rmtree(run / ".hydra", ignore_errors=True)
    for file in run.glob("run*.log"):
        file.unlink(missing_ok=True)
    if run.is_dir() and not any(run.iterdir()):
        run.rmdir()
