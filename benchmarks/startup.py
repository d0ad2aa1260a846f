"""Times the command from its start: help, the composed configuration, and the first optimizer step of a tiny model.

    python benchmarks/startup.py

The first step is that of experiment=sft_world, without and with a cache of tokenized rows. The best of several
runs counts: other programs on the machine only add to it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

STEP = ("experiment=sft_world", "max_steps=1")
COMMANDS = {
    "rlhf --help": ("--help",),
    "rlhf --cfg job": (*STEP, "--cfg", "job"),
    "first step, no cache": STEP,
    "first step, cached rows": STEP,
}


def seconds(arguments: tuple[str, ...], folder: Path) -> float:
    """Return the time until the first step is reported, or until the process ends without one."""
    command = [sys.executable, "-m", "rlhf_lightning", *arguments]
    env = os.environ | {"RLHF_CACHE": str(folder / "cache")}
    began = time.perf_counter()
    stepped = None
    with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if "step 1/1" in line:
                stepped = time.perf_counter() - began
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return time.perf_counter() - began if stepped is None else stepped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/startup.json"))
    options = parser.parse_args()
    runs_of: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            for name, arguments in COMMANDS.items():
                runs_of[name].append(seconds(arguments, Path(folder)))
    table = Table("command", "best", "all runs", title="seconds from the start of the process")
    for name, runs in runs_of.items():
        table.add_row(name, f"{min(runs):.2f}", ", ".join(f"{run:.2f}" for run in runs))
    Console().print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"machine": platform.machine(), "cores": os.cpu_count(), "seconds": runs_of}
    options.out.write_text(json.dumps(about, indent=1))
    print(options.out)


if __name__ == "__main__":
    main()
