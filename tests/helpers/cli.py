"""The `rlhf` command as tests run it."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import IO

from tests.helpers import fork_server as fork_server_module
from tests.helpers.fork_server import Forked

SMALL = ["model.build.hidden_size=32", "model.build.layers=1", "model.build.heads=2", "model.build.vocab_size=300"]


class ForkServer:
    """Runs `rlhf` in forks of one process that has imported what takes seconds to import."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()  # of its socket, whose path must be short
        self.path = f"{self.folder.name}/socket"
        self.process = subprocess.Popen(
            [sys.executable, "-P", fork_server_module.__file__, self.path],
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},  # read by imports
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,  # so that close() reaches the children
        )
        assert self.process.stdout is not None
        with self.process.stdout as ready:
            if not ready.readline():
                raise RuntimeError(f"the fork server ended with {self.process.wait()}")

    def start(self, arguments: Sequence[str], cwd: Path, env: dict[str, str], out: IO[str], err: IO[str]) -> Forked:
        """Start `python -m rlhf_lightning` with `arguments`, its output into two files."""
        return Forked(self.path, list(arguments), str(cwd), env, out.fileno(), err.fileno())

    def run(self, arguments: Sequence[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Return what the command prints and its exit code, as subprocess.run does."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            code = self.start(arguments, cwd, env, out, err).wait()
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(["rlhf", *arguments], code, out.read(), err.read())

    def close(self) -> None:
        """Kill the server and every process it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.folder.cleanup()


@cache
def fork_server() -> ForkServer:
    """Return the server of this process, started at the first call."""
    server = ForkServer()
    atexit.register(server.close)
    return server


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Return the environment of a command that runs in `folder`."""
    return os.environ | {"OMP_NUM_THREADS": "1", "RLHF_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"} | more


def rlhf(folder: Path, *arguments: str, code: int | None = 0, fork: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder` and check how it ended; `code` None is any failure.

    With `fork` it runs in a fork of a process that is ready, else in an interpreter of its own.
    """
    if fork:
        try:
            done = fork_server().run(arguments, folder, environment(folder))
        except BaseException:  # a timeout, Ctrl-C: the next command must not get the answer to this one
            fork_server().close()
            fork_server.cache_clear()
            raise
    else:
        command = [sys.executable, "-m", "rlhf_lightning", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment(folder), text=True, capture_output=True)
    ended = done.returncode != 0 if code is None else done.returncode == code
    assert ended, done.stdout[-2000:] + done.stderr[-3000:]
    if code == 2:
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith(("rlhf: ", "usage: "))
    return done


def newest(folder: Path, stage: str) -> Path:
    """Return the run folder of `stage` that was started last."""
    return max((folder / "outputs" / stage).glob("*/*"))
