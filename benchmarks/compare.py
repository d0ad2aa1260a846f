"""Times this package beside TRL on the same rows, model, precision, optimizer and batch: `make bench`.

Both sides are processes that live at the same time and take turns, step by step: a machine that slows down slows both.
Before anything is timed, the losses of the first step must agree. Results go to a JSON file and a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rlhf_lightning.models.loading import resolve_model

NO_CHECKPOINTING = {"activation_checkpointing": False}
# rows of TRL's packing hold as many tokens as max_length: two of them are about as many tokens as eight rows
PACKING = NO_CHECKPOINTING | {"packing": True, "per_device_train_batch_size": 2}
# the settings of each side beside the common ones; quote TRL's best setting
WORKLOADS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "sft": ({}, {"default": {}, "no checkpointing": NO_CHECKPOINTING,
                 "padding-free": NO_CHECKPOINTING | {"padding_free": True}, "packing": PACKING}),
    "reward": ({"center": 0.0}, {"default": {}, "no checkpointing": NO_CHECKPOINTING}),
    "dpo": ({}, {"default": {}, "no checkpointing": NO_CHECKPOINTING}),
    "dpo-cached": ({"reference": "cached"}, {"default": {"precompute_ref_log_probs": True},
                   "no checkpointing": NO_CHECKPOINTING | {"precompute_ref_log_probs": True}}),
}  # fmt: skip


class Side:
    """A process that makes one step when asked."""

    def __init__(self, spec: dict[str, Any], program: str = "side.py", python: str = sys.executable) -> None:
        self.log = Path(spec["cache"], f"{spec['side']}.log")
        command = [python, str(Path(__file__).with_name(program))]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        self.ready = self.ask(json.dumps(spec))

    def ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            raise SystemExit(f"a side ended: {self.log.read_text()[-3000:]}")
        return json.loads(reply)


def compare(name: str, setting: str, precision: str, options: argparse.Namespace, cache: str) -> dict[str, Any]:
    """Return the medians, pairwise ratios and peaks of one workload and one setting of TRL.

    The two sides take the same rows in the same step and must agree in the loss; only with packing TRL decides which
    rows a step holds, so there the ratio is of seconds per token.
    """
    ours, theirs = WORKLOADS[name]
    same_rows = setting != "packing"
    load = {"compile": True} if options.compile else {}
    spec = {
        "stage": name.partition("-")[0], "model": options.model, "data": options.data, "rows": options.rows,
        "batch": options.batch, "max_length": options.max_length, "precision": precision, "lr": 1e-6,
        "cache": cache,
    }  # fmt: skip
    sides = [
        Side(spec | {"side": "ours", "options": ours, "accumulate": options.accumulate, "load": load}),
        Side(spec | {"side": "trl", "options": theirs[setting]}),
    ]
    steps: list[list[dict[str, Any]]] = [[], []]
    with Progress(transient=True) as bar:
        task = bar.add_task(f"{name}, TRL {setting}", total=2 * (options.steps + 1))
        for _ in range(options.steps + 1):  # the first is a warm-up, and compares the losses
            for side, of_side in zip(sides, steps, strict=True):
                of_side.append(side.ask("go"))
                bar.advance(task)
            gap = abs(steps[0][-1]["loss"] - steps[1][-1]["loss"]) / max(abs(steps[1][-1]["loss"]), 1e-9)
            if same_rows and gap > options.tolerance * (1 if precision == "32-true" else 20):
                losses = [of_side[-1]["loss"] for of_side in steps]
                raise SystemExit(f"{name}, TRL {setting}: the losses differ: {losses}")
    peaks = [side.ask("end")["peak_gb"] for side in sides]
    a, b = ([step["seconds"] for step in of_side[1:]] for of_side in steps)
    if not same_rows:  # scaled to the tokens of our step
        b = [y["seconds"] / y["tokens"] * x["tokens"] for x, y in zip(steps[0][1:], steps[1][1:], strict=True)]
    ratios = [y / x for x, y in zip(a, b, strict=True)]
    shares = [step["flops"] / step["seconds"] / sides[0].ready["matmul_rate"] for step in steps[0][1:]]
    tokens = [step["tokens"] / step["seconds"] for step in steps[0][1:]]
    return {
        "workload": name, "trl": setting, "precision": precision, "accumulate": options.accumulate,
        "compile": options.compile,
        "ours_s": statistics.median(a), "trl_s": statistics.median(b),
        "ratio": statistics.median(ratios), "ratios": ratios, "ours_gb": peaks[0], "trl_gb": peaks[1],
        "rows_per_s": options.batch / statistics.median(a), "tokens_per_s": statistics.median(tokens),
        "matmul_share": statistics.median(shares), "matmul_gflops": sides[0].ready["matmul_rate"] / 1e9,
        "losses": [[step["loss"] for step in of_side] for of_side in steps], "steps": steps,
    }  # fmt: skip


def show(results: list[dict[str, Any]]) -> None:
    """Print a row per comparison."""
    table = Table(title="seconds per step (median), ratio of pairs, peak memory of the process")
    for name in (
        "workload",
        "precision",
        "TRL's setting",
        "ours",
        "TRL",
        "TRL / ours",
        "ours GB",
        "TRL GB",
        "rows/s",
        "tokens/s",
        "of matmul",
    ):
        table.add_column(name)
    for r in results:
        low, high = min(r["ratios"]), max(r["ratios"])
        table.add_row(
            r["workload"], r["precision"], r["trl"], f"{r['ours_s']:.2f}", f"{r['trl_s']:.2f}",
            f"{r['ratio']:.2f} ({low:.2f}..{high:.2f})", f"{r['ours_gb']:.1f}",
            f"{r['trl_gb']:.1f}", f"{r['rows_per_s']:.2f}", f"{r['tokens_per_s']:.0f}",
            f"{r['matmul_share']:.0%}",
        )  # fmt: skip
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help=", ".join(WORKLOADS))
    parser.add_argument("--model", default="smollm2", help="model folder, or smollm2 from its wheel")
    parser.add_argument("--data", required=True, help="preferences as .jsonl or .jsonl.gz")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--precision", nargs="+", default=["32-true"], choices=["32-true", "bf16-mixed"])
    parser.add_argument("--steps", type=int, default=4, help="timed steps; with one more, at most an epoch")
    parser.add_argument("--accumulate", type=int, default=1, help="microbatches per step on our side")
    parser.add_argument("--compile", action="store_true", help="compile the decoder layers on our side")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--settings", nargs="*", help="only these settings of TRL")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/compare.json"))
    options = parser.parse_args()
    options.model = resolve_model(options.model, Path.home() / ".cache" / "rlhf_lightning")
    about = {
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "lightning")},
        "options": {key: str(value) for key, value in vars(options).items()},
    }  # fmt: skip
    results: list[dict[str, Any]] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        for precision, name in itertools.product(options.precision, options.workloads):
            for setting in WORKLOADS[name][1]:
                if not options.settings or setting in options.settings:
                    results.append(compare(name, setting, precision, options, cache))
                    show(results)
                    options.out.write_text(json.dumps(about | {"results": results}, indent=1))
    print(options.out)


if __name__ == "__main__":
    main()
