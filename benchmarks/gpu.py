"""What a GPU computes right, and how fast, in one call of a few minutes: `make gpu`.

Parts run in order, each writes its figures into `<out>/gpu.json` before the next begins. None is begun when the time
left is short, and one that takes longer is ended. Models have random weights: a billion parameters in the shape of
Llama (`--size tiny` tries the program on a CPU). The last lines are a table.

MFU is the floating-point operations a step needs (`step_flops` in flops.py: no padding, no attention outside of a
group, the head at tokens in the loss mask only, nothing recomputed) per second, as a share of the peak given by
`--peak` (dense bfloat16 of an H100 or H200: 989 TFLOP/s).
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

from gpu_models import GENERATIONS, PROMPTS, SIZES, Bench
from gpu_parts import GRPO, ceilings, decode, offline, online, profile, profile_decode
from gpu_trl import trl_dpo, trl_grpo, trl_sft
from rich.console import Console
from rich.table import Table


def tests(bench: Bench, name: str) -> None:
    """The tests of the GPU path, with `--size tiny` on a CPU those it can run."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    root, written = Path(__file__).resolve().parents[1], bench.out / "tests.txt"
    with written.open("w") as text:
        environment = os.environ | {"RLHF_GPU_TESTS_DEVICE": bench.device}
        done = subprocess.run(
            command, cwd=root, env=environment, stdout=text, stderr=subprocess.STDOUT, timeout=120, check=False
        )
    lines = written.read_text().strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
    bench.record(name, rc=done.returncode, last=lines[-1:], failed=failed[:12])


@dataclass(frozen=True)
class Part:
    """What runs, the seconds it may need, and its arguments beside the bench and its name."""

    work: Callable[..., None]
    seconds: int
    options: dict[str, Any] = field(default_factory=dict)


PARTS = {
    "tests": Part(tests, 40),
    "ceilings": Part(ceilings, 5),
    "sft": Part(offline, 15, {"stage": "sft"}),
    "reward": Part(offline, 15, {"stage": "reward"}),
    "dpo": Part(offline, 15, {"stage": "dpo"}),
    "sft_compiled": Part(offline, 45, {"stage": "sft", "load": {"compile": True}}),
    "dpo_compiled": Part(offline, 45, {"stage": "dpo", "load": {"compile": True}}),
    "sft_bf16": Part(offline, 15, {"stage": "sft", "load": {"dtype": "bfloat16"}, "precision": "bf16-true"}),
    "decode": Part(decode, 25),
    "grpo": Part(online, 25, {"prompts": PROMPTS, "n": GENERATIONS, **GRPO}),
    "ppo": Part(online, 25, {"prompts": 4 * PROMPTS, "n": 1}),
    "trl_sft": Part(trl_sft, 25),
    "trl_dpo": Part(trl_dpo, 30),
    "trl_grpo": Part(trl_grpo, 50),
    "profile": Part(profile, 20),
    "profile_decode": Part(profile_decode, 20),
}


def table(results: dict[str, Any]) -> Table:
    """Return the figures as a table."""
    made = Table(title=f"{results['machine']['device']}, torch {results['machine']['torch']}")
    columns = ("step_s", "tokens_per_s", "mfu", "memory_gb", "sampling_share", "ratio")
    for name in ("part", *columns, "more"):
        made.add_column(name)
    for name, values in results.items():
        cells = [f"{values[c]:,.3g}" if isinstance(values.get(c), float) else "" for c in columns]
        rest = {k: v for k, v in values.items() if k not in columns and isinstance(v, float | int | str)}
        more = ", ".join(f"{k}={v:,.4g}" if isinstance(v, float) else f"{k}={str(v)[:90]}" for k, v in rest.items())
        made.add_row(name, *cells, more)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="../outputs/benchmarks/gpu")
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--seconds", type=float, default=480, help="end after so many seconds")
    parser.add_argument("--peak", type=float, default=989.0, help="peak TFLOP/s for MFU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[], help="all but these")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bench = Bench(args)

    def out_of_time(*_: Any) -> None:
        raise TimeoutError(f"longer than the {args.seconds:.0f} s of --seconds")

    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, max(args.seconds - (time.perf_counter() - bench.began), 0.001))
    for name in (name for name in args.parts if name not in args.skip):
        part = PARTS[name]
        if time.perf_counter() - bench.began + part.seconds > args.seconds:
            bench.record(name, skipped=f"{part.seconds} s may be too many")
            continue
        try:
            part.work(bench, name, **part.options)
        except Exception as error:  # the other parts are worth their figures
            bench.record(name, error=f"{type(error).__name__}: {str(error)[:300]}")
            (bench.out / f"{name}.txt").write_text(traceback.format_exc())
    signal.setitimer(signal.ITIMER_REAL, 0)
    Console(width=180).print(table(bench.results))


if __name__ == "__main__":
    main()
