"""The process that has imported what the `rlhf` command needs, and forks a child for each command.

`python fork_server.py <file descriptor of a socket>`: a line of JSON with arguments, cwd, env, stdout and stderr comes
in; the exit code of the child goes out.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import socket
import sys
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


def next_command(channel: socket.socket) -> dict[str, Any]:
    """Fork a child for each command and wait for it; return the command in that child, and nothing in this process."""
    with channel, channel.makefile() as lines:
        for line in lines:
            pid = os.fork()
            if pid == 0:
                return json.loads(line)
            _, status = os.waitpid(pid, 0)
            channel.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    sys.exit()


if __name__ == "__main__":
    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()  # or the first collection in a child would copy the memory of all modules
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has none of these threads"
    command = next_command(socket.socket(fileno=int(sys.argv[1])))
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["env"])
    for stream, path in ((1, command["stdout"]), (2, command["stderr"])):
        file = os.open(path, os.O_WRONLY)
        os.dup2(file, stream)
        os.close(file)
    sys.argv[1:] = command["arguments"]
    sys.path.insert(0, command["cwd"])  # as -m does
    importlib.invalidate_caches()
    runpy.run_module("rlhf_lightning", run_name="__main__", alter_sys=True)
