"""Runs a stage as a process of its own, for pipelines and sweeps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from hydra.core.hydra_config import HydraConfig


def run_child(folder: Path, overrides: list[str], environment: Mapping[str, str] | None = None) -> int:
    """Run `rlhf` with `overrides` in the run folder `folder`, going on where it stopped before; return its exit code.

    The user's `--config-dir` and signals are passed on.

    Raises:
        KeyboardInterrupt: the child was interrupted.
    """
    sources = HydraConfig.get().runtime.config_sources
    configs = [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    command = [sys.executable, "-m", "rlhf_lightning", *configs, *overrides, f"hydra.run.dir={quoted(str(folder))}"]
    child = subprocess.Popen([*command, "hydra.mode=RUN", "resume=here"], env=os.environ | dict(environment or {}))
    previous = signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    try:
        code = child.wait()
    except KeyboardInterrupt:  # the terminal sent it to the child as well
        code = child.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)
    if code in (130, 143, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt(code if code > 0 else 128 - code)
    return code


def quoted(text: str) -> str:
    """Return `text` as a quoted value of Hydra's override grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
