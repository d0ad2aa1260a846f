"""The candidates stage: from prompts to `candidates.jsonl`, on as many devices as the Trainer has."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from rlhf_lightning.callbacks.stop import Stop
from rlhf_lightning.callbacks.throughput import peak_memory_gb
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.policy import interval
from rlhf_lightning.feedback.candidates import Candidates
from rlhf_lightning.feedback.shards import ShardWriter, merge, remove
from rlhf_lightning.files import readable_os_errors, write_json


def run_candidates(run: Path, trainer: Trainer, module: Candidates, data: Any, monitor: str) -> float | None:
    """Answer or score every prompt of `data`, write candidates.jsonl and metrics.json, return the monitored metric."""
    shards, target = run / "shards", run / "candidates.jsonl"
    trainer.callbacks.insert(0, ShardWriter(shards))  # type: ignore[attr-defined]  # before Stop drops the batch
    began = time.perf_counter()
    stops = [callback for callback in trainer.callbacks if isinstance(callback, Stop)]  # type: ignore[attr-defined]
    try:
        with readable_os_errors(run):
            trainer.predict(module, data, return_predictions=False)
    except SystemExit:  # what Lightning makes of an interrupt
        if not any(stop.received for stop in stops):
            raise
        raise KeyboardInterrupt(128 + next(stop.received for stop in stops if stop.received)) from None
    trainer.strategy.barrier()
    if not trainer.is_global_zero:
        return None
    found: dict[str, list[Any]] = {}  # metric -> (row, value)
    rows = responses = 0
    for row in merge(shards, target):
        rows, responses = rows + 1, responses + len(row["responses"])
        for metric, values in measured(row).items():
            found.setdefault(metric, []).extend((rows, value) for value in values)
    if rows != len(data.rows["train"]):
        target.unlink()
        raise UserError(f"{shards} holds {rows} of {len(data.rows['train'])} rows; {run} must be on a shared disk")
    table = {name: interval(name, [v for _, v in held], [r for r, _ in held]) for name, held in found.items()}
    metrics: dict[str, Any] = {"rows": rows, "responses": responses, "perf/peak_memory_gb": peak_memory_gb()}
    metrics["perf/rows_per_s"] = (rows - len(data.answered)) / (time.perf_counter() - began)
    for name, (mean, low, high) in table.items():
        metrics |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    metrics["monitor"] = monitor if monitor in table else next(iter(table), None)
    write_json(run / "metrics.json", metrics)
    remove(shards)
    show(table, rows, responses)
    Console().print(f"candidates  {target}", soft_wrap=True)
    return metrics.get(str(metrics["monitor"]))


def measured(row: dict[str, Any]) -> dict[str, list[float]]:
    """Return metric -> its values in one row of candidates."""
    found: dict[str, list[float]] = {}
    if "scores" in row:
        found |= {"score": row["scores"], "best_score": [max(row["scores"])]}
    if isinstance(row.get("tokens"), list) and isinstance(row.get("finished"), list):
        found |= {"length": row["tokens"], "ended_with_eos": [float(done) for done in row["finished"]]}
    return found


def show(table: dict[str, tuple[float, float, float]], rows: int, responses: int) -> None:
    """Print each metric with its 95% interval."""
    printed = Table("", "mean", "95%", title=f"{responses} responses to {rows} prompts")
    for name, (mean, low, high) in table.items():
        printed.add_row(name, f"{mean:.4g}", f"{low:.4g} .. {high:.4g}")
    Console().print(printed)
