"""The process that has imported what the `rlhf` command needs, and forks a child for each command.

`python fork_server.py <socket>`: over a connection to the socket come the arguments, the working directory and the
environment as JSON, with the two file descriptors for its output; back come the child's process id, then its exit code.
Ranks and trials that a command starts are forked from here as well.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import runpy
import selectors
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Any

# Nothing of this project: its modules may keep what they find in the environment and in the terminal. And nothing that
# starts a thread, which a fork would lose: pyarrow, hence neither pandas nor datasets.
HEAVY = [
    "hydra._internal.hydra",
    "hydra.core.plugins",
    "lightning.pytorch",
    "matplotlib.figure",
    "peft",
    "tensorboard.plugins.hparams.summary_v2",
    "torch._dynamo",
    "torch.distributed.tensor.parallel",
    "torch.utils.tensorboard",
    "torchmetrics.classification",
    "transformers.models.llama.modeling_llama",
]
COMMANDS = [[sys.executable, "-m", name] for name in ("rlhf_lightning", "rlhf_lightning.__main__")]


class Forked:
    """A command that runs in a fork of the server, with the methods of `subprocess.Popen` that are used for one."""

    def __init__(
        self, path: str, arguments: list[str], cwd: str | None, env: dict[str, str] | None, out: int = 1, err: int = 2
    ) -> None:
        self.channel = socket.socket(socket.AF_UNIX)
        self.channel.connect(path)
        command = {"arguments": arguments, "cwd": cwd or os.getcwd(), "env": dict(env or os.environ)}
        socket.send_fds(self.channel, [b"\n"], [out, err])
        self.channel.sendall(json.dumps(command).encode() + b"\n")
        self.answers = self.channel.makefile()
        self.pid, self.returncode = int(self.answers.readline() or self._lost()), None

    def wait(self) -> int:
        if self.returncode is None:
            self.channel.settimeout(None)
            self.returncode = int(self.answers.readline() or self._lost())
            self.answers.close()
            self.channel.close()
        return self.returncode

    def poll(self) -> int | None:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self.channel, selectors.EVENT_READ)
                if not selector.select(0):
                    return None
        return self.wait()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _lost(self) -> int:
        raise RuntimeError("the fork server has ended")


def serve(path: str) -> dict[str, Any]:
    """Fork a child for each command; return the command in that child, and nothing in this process."""
    children: dict[int, tuple[int, socket.socket]] = {}
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                channel, _ = listener.accept()
                _, fds, _, _ = socket.recv_fds(channel, 1, 2)
                with channel.makefile() as lines:
                    command = json.loads(lines.readline())
                if (pid := os.fork()) == 0:
                    for stream, fd in enumerate(fds, 1):
                        os.dup2(fd, stream)
                        os.close(fd)
                    selector.close()
                    listener.close()
                    channel.close()
                    for pidfd, (_, other) in children.items():
                        os.close(pidfd)
                        other.close()
                    return command
                for fd in fds:
                    os.close(fd)
                pidfd = os.pidfd_open(pid)
                children[pidfd] = pid, channel
                selector.register(pidfd, selectors.EVENT_READ)
                answer(channel, pid)
            else:
                selector.unregister(key.fd)
                pid, channel = children.pop(key.fd)
                os.close(key.fd)
                answer(channel, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                channel.close()


def answer(channel: socket.socket, number: int) -> None:
    """Send a number; whoever asked may have been killed."""
    with suppress(BrokenPipeError):
        channel.sendall(f"{number}\n".encode())


def fork_commands(path: str) -> None:
    """Let `subprocess.Popen` start this project's command, and nothing else, in forks of the server.

    The fork server of pipelines, which would import everything once more, cannot be had: they do without it.
    """

    class Popen(subprocess.Popen):
        def __new__(cls, command: Any, *args: Any, cwd: Any = None, env: Any = None, **kwargs: Any) -> Any:
            if list(command[:3]) in COMMANDS and not args and not kwargs:
                return Forked(path, list(command[3:]), cwd, env)
            return super().__new__(cls)

    def get_context(method: str | None = None) -> Any:
        if method == "forkserver":
            raise OSError("the tests have a fork server")
        return context_of(method)

    subprocess.Popen = Popen  # type: ignore[misc]
    context_of, multiprocessing.get_context = multiprocessing.get_context, get_context  # type: ignore[assignment]


if __name__ == "__main__":
    for name in HEAVY:
        importlib.import_module(name)
    rank_zero = importlib.import_module("lightning.fabric.utilities.rank_zero")
    gc.freeze()  # or the first collection in a child would copy the memory of all modules
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has none of these threads"
    command = serve(sys.argv[1])
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["env"])
    # Lightning reads the rank when it is imported
    rank = next((value for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if (value := os.environ.get(key))), "0")
    rank_zero.rank_zero_only.rank = int(rank)  # type: ignore[attr-defined]
    fork_commands(sys.argv[1])
    sys.argv[1:] = command["arguments"]
    sys.path.insert(0, command["cwd"])  # as -m does
    importlib.invalidate_caches()
    runpy.run_module("rlhf_lightning", run_name="__main__", alter_sys=True)
