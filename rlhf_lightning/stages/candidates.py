"""`rlhf stage=candidates`: from prompts to `candidates.jsonl`, on as many devices as the Trainer has."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from rlhf_lightning.callbacks.stop import interruptible
from rlhf_lightning.callbacks.throughput import peak_memory_gb
from rlhf_lightning.data.tokenize import report_rows
from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.shards import ShardWriter, merge, remove
from rlhf_lightning.files import readable_os_errors, write_json
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.ops.statistics import Interval, as_metrics, mean_interval, share_interval
from rlhf_lightning.rewards.ensemble import DISAGREEMENT
from rlhf_lightning.runtime.libraries import readable_library_errors
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages.training import build_trainer

YES_OR_NO = ("ended_with_eos",)


def run(run: Run) -> float | None:
    """Answer or score every prompt, write candidates.jsonl and metrics.json, and return the monitored metric."""
    folder = run.start_folder()
    shards, target = run.folder / "shards", run.folder / "candidates.jsonl"
    writer = ShardWriter(shards)
    data = run.data(folder, rows=True, done=lambda: writer.done)
    data.setup("predict")
    module = run.module(
        partial(load_causal_lm, folder, **run.settings["model"]["load"]),
        reward=run.reward("reward_from"),
        engine=run.build("sampler"),
        seed=run.settings["seed"],
        **run.options,
    )
    trainer = build_trainer(run, [writer])
    if rank_zero_only.rank == 0:
        report_rows(data)
    began = time.perf_counter()
    with interruptible(trainer), readable_os_errors(run.folder), readable_library_errors():
        trainer.predict(module, data, return_predictions=False)
    trainer.strategy.barrier()
    if not trainer.is_global_zero:
        return None
    columns: dict[str, list[Any]] = {}  # metric -> (row, value)
    rows = responses = 0
    for row in merge(shards, target):
        rows, responses = rows + 1, responses + len(row["responses"])
        for metric, values in measured(row).items():
            columns.setdefault(metric, []).extend((rows, value) for value in values)
    if rows != len(data.rows["train"]):
        target.unlink()
        raise UserError(f"{shards} has {rows} of {len(data.rows['train'])} rows; {run.folder} must be on a shared disk")
    table: dict[str, Interval] = {}
    for name, pairs in columns.items():
        interval = share_interval if name in YES_OR_NO else mean_interval
        table[name] = interval([value for _, value in pairs], [number for number, _ in pairs])
    metrics: dict[str, Any] = {"rows": rows, "responses": responses, "perf/peak_memory_gb": peak_memory_gb()}
    metrics["perf/rows_per_s"] = (rows - len(writer.done)) / (time.perf_counter() - began)
    for name, value in table.items():
        metrics |= as_metrics(name, value)
    monitor = run.settings["monitor"]
    metrics["monitor"] = monitor if monitor in table else next(iter(table), None)
    write_json(run.folder / "metrics.json", metrics)
    remove(shards)
    show(table, rows, responses)
    Console().print(f"candidates  {target}", soft_wrap=True)
    return metrics.get(str(metrics["monitor"]))


def measured(row: dict[str, Any]) -> dict[str, list[float]]:
    """Return metric -> its values in one row of candidates."""
    values: dict[str, list[float]] = {}
    if "scores" in row:
        values |= {"score": row["scores"], "best_score": [max(row["scores"])]}
    if DISAGREEMENT in row:
        values[DISAGREEMENT] = row[DISAGREEMENT]
    if isinstance(row.get("tokens"), list) and isinstance(row.get("finished"), list):
        values |= {"length": row["tokens"], "ended_with_eos": [float(done) for done in row["finished"]]}
    return values


def show(table: dict[str, Interval], rows: int, responses: int) -> None:
    """Print each metric with its 95% interval."""
    printed = Table("", "mean", "95%", title=f"{responses} responses to {rows} prompts")
    for name, (mean, low, high) in table.items():
        printed.add_row(name, f"{mean:.4g}", f"{low:.4g} .. {high:.4g}" if math.isfinite(low) else "one prompt")
    Console().print(printed)
