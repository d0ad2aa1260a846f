"""Runs a stage as a process of its own, for pipelines and sweeps."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

PRELOAD = [  # what takes seconds to import; nothing that starts a thread, which a fork would lose
    "hydra.main",
    "lightning.pytorch",
    "rlhf_lightning.models.peft",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "torchmetrics.classification",
    "transformers.models.llama.modeling_llama",
]


PARENT = "RLHF_PARENT"
"""The environment variable with the process id of the pipeline or sweep that started this process."""


def end_with_parent() -> None:
    """Have this process get SIGTERM when the pipeline or sweep that started it has gone, for example killed.

    It would otherwise go on unseen, and hold the folder that a second start wants to continue in.
    """
    number = os.environ.pop(
        PARENT, None
    )  # of this process only: one that it starts on another machine has no such parent
    if number is None or not hasattr(os, "pidfd_open"):
        return
    try:
        parent = os.pidfd_open(int(number))
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGTERM)
        return
    except OSError:  # a container without that system call
        return

    def wait() -> None:
        select.select([parent], [], [])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True, name="end with parent").start()


def run_child(
    folder: Path, overrides: list[str], environment: Mapping[str, str] | None = None, fork: bool = False
) -> int:
    """Run `rlhf` with `overrides` in the run folder `folder`, continuing where it stopped; return its exit code.

    The user's `--config-dir` and signals are passed on.

    Args:
        environment: variables to add to those of this process.
        fork: fork a server process that has imported torch and the like, which saves seconds; variables that libraries
            read when they are imported (OMP_NUM_THREADS) are then those of this process.

    Raises:
        KeyboardInterrupt: the child was interrupted.
    """
    sources = HydraConfig.get().runtime.config_sources
    configs = [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    arguments = [*configs, *overrides, f"hydra.run.dir={quoted(str(folder))}", "hydra.mode=RUN", "resume=here"]
    variables = os.environ | dict(environment or {}) | {PARENT: str(os.getpid())}
    child: Started | Forked | None = None

    def forward(number: int, frame: Any) -> None:
        if child is not None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(child.pid, number)
        else:
            raise KeyboardInterrupt(128 + number)

    previous = signal.signal(signal.SIGTERM, forward)
    try:
        child = start(arguments, variables, fork)
        code = child.wait()
    except KeyboardInterrupt:
        if child is None:
            raise
        code = child.wait()  # the terminal sent it to the child as well
    finally:
        signal.signal(signal.SIGTERM, previous)
    if code in (130, 143, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt(code if code > 0 else 128 - code)
    return code


def start(arguments: list[str], environment: Mapping[str, str], fork: bool) -> Started | Forked:
    """Start `rlhf`; a fork server that cannot be had (a path of TMPDIR too long for its socket) is done without."""
    if fork:
        with suppress(OSError):
            return Forked(arguments, environment)
    return Started(arguments, environment)


class Started:
    """`rlhf` in an interpreter of its own."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str]) -> None:
        self.child = subprocess.Popen([sys.executable, "-m", "rlhf_lightning", *arguments], env=dict(environment))
        self.pid = self.child.pid

    def wait(self) -> int:
        """Return the exit code, negative for a signal."""
        return self.child.wait()


class Forked:
    """`rlhf` in a fork of a server process that is started once and has imported `PRELOAD`."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.child = context.Process(target=_main, args=(arguments, dict(environment)))
        self.child.start()
        self.pid = self.child.pid or 0

    def wait(self) -> int:
        """Return the exit code, negative for a signal."""
        self.child.join()
        return self.child.exitcode or 0


def _main(arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    sys.path.insert(0, os.getcwd())  # as -m does
    sys.modules.pop("rlhf_lightning.__main__", None)  # multiprocessing has imported it under this name
    try:
        runpy.run_module("rlhf_lightning", run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out; loggers end their runs there


def quoted(text: str) -> str:
    """Return `text` as a quoted value of Hydra's override grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
