"""`rlhf stage=judge`: comparisons labeled by a judge, and how far the judge can be trusted."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rlhf_lightning.callbacks.stop import interrupted_at_once
from rlhf_lightning.data.layouts import Columns, Row
from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.feedback.judge_figures import CALIBRATIONS, counts, figures, soft_rows, temperature_of, warnings
from rlhf_lightning.feedback.judging import MODES, Judged, ToJudge, details, judge_comparisons, read_comparisons
from rlhf_lightning.files import readable_os_errors, write_json, write_jsonl
from rlhf_lightning.judges.judge import Judge
from rlhf_lightning.judges.table import load_judge
from rlhf_lightning.ops.statistics import Interval, as_metrics
from rlhf_lightning.runtime.run import Run

PART = "labels.part.jsonl"
"""What was judged so far, by which an interrupted run goes on."""


def run(run: Run) -> float | None:
    """Judge the comparisons of data.train, write labels.jsonl and metrics.json, and return the monitored metric."""
    options, data = run.options, run.settings["data"]
    for key, allowed in (("mode", MODES), ("calibrate", CALIBRATIONS)):  # before any work
        if options[key] not in allowed:
            raise UserError(f"judge.{key}={options[key]} is not one of {', '.join(allowed)}")
    check_number("judge.tie_margin", options["tie_margin"], "[0, 0.5)")
    source = run.sources["data.train"]
    asked, skipped = read_comparisons(source, Columns(data["columns"]), data["on_bad_row"])
    say(f"{len(asked)} comparisons of {source.name}{f', {skipped} rows skipped' if skipped else ''}")
    judge = load_judge(run.judge or {})
    if hasattr(judge, "to"):
        judge.to(run.device)  # type: ignore[attr-defined]
    part, began = run.folder / PART, time.perf_counter()
    with contextlib.closing(judge), readable_os_errors(run.folder), interrupted_at_once():
        rows = kept_rows(part, asked)
        before = len(rows)
        failed = judge_rest(run, judge, asked, rows)
    seconds = time.perf_counter() - began
    fresh = sum(row["judge"]["cached"] < row["judge"]["questions"] for row in [*rows[before:], *failed])
    if not rows:
        raise UserError(f"no comparison got a verdict of {judge.name}; {run.folder / 'failures.jsonl'} says why")
    order = {to_judge.comparison.id: place for place, to_judge in enumerate(asked)}
    rows.sort(key=lambda row: order[row["id"]])
    known = {to_judge.comparison.id: to_judge.known for to_judge in asked}
    table = figures(rows, known, options["mode"] != "pointwise")
    counted = counts([row["judge"] for row in [*rows, *failed]])
    metrics: dict[str, Any] = {"comparisons": len(asked), "judged": len(rows), "failed": len(failed)} | counted
    temperature, measured = temperature_of(rows, known, options["calibrate"])
    metrics |= measured | ({"perf/comparisons_per_s": fresh / seconds} if fresh else {})
    for name, value in table.items():
        metrics |= as_metrics(name, value)
    for logger in run.loggers():
        logger.log_metrics(metrics, 0)
        logger.finalize("success")
    monitor = run.settings["monitor"]
    metrics["monitor"] = monitor if monitor in metrics else next(iter(table), None)
    if options["soft_labels"]:
        write_jsonl(run.folder / "preferences.jsonl", soft_rows(rows, temperature))
    write_json(run.folder / "metrics.json", metrics)
    write_jsonl(run.folder / "labels.jsonl", rows)
    part.unlink(missing_ok=True)
    show(judge.name, table, metrics)
    for line in warnings(table, counted):
        Console().print(line, style="yellow", markup=False, soft_wrap=True)
    say(f"labels      {run.folder / 'labels.jsonl'}")
    if options["soft_labels"]:
        say(f"preferences {run.folder / 'preferences.jsonl'}")
    return metrics.get(str(metrics["monitor"]))


def kept_rows(part: Path, asked: list[ToJudge]) -> list[Row]:
    """Return the rows that an interrupted run wrote, without a last line that is not whole."""
    if not part.exists():
        return []
    names, kept = {to_judge.comparison.id for to_judge in asked}, {}
    for line in part.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if line.endswith(b"\n") and row["id"] in names:
                kept[row["id"]] = row
    write_jsonl(part, list(kept.values()))
    return list(kept.values())


def judge_rest(run: Run, judge: Judge, asked: list[ToJudge], rows: list[Row]) -> list[Row]:
    """Judge what `rows` does not have, append each label to `rows` and to the file, and return the failures."""
    done = {row["id"] for row in rows}
    rest = [to_judge.comparison for to_judge in asked if to_judge.comparison.id not in done]
    failed: list[Row] = []
    with (
        (run.folder / PART).open("a", encoding="utf-8") as labels,
        (run.folder / "failures.jsonl").open("w", encoding="utf-8") as failures,
        bar(len(asked), len(rows)) as advance,
    ):
        for result in judge_comparisons(judge, rest, run.options["mode"], run.options["tie_margin"]):
            if result.label is not None:
                rows.append(append(labels, result.label.row()))
            else:
                failed.append(append(failures, failure_row(result)))
            advance(result, len(failed))
    if not failed:
        (run.folder / "failures.jsonl").unlink()
    return failed


def failure_row(result: Judged) -> Row:
    """Return what is recorded of a comparison without a verdict: what failed, and what the judge wrote."""
    answers = [
        {"failure": answer.failure} | ({"text": answer.text[:1000]} if answer.text else {})
        for answer in result.answers
        if answer.failure
    ]
    responses = list(result.comparison.responses)
    return {
        "id": result.comparison.id, "prompt": result.comparison.prompt, "responses": responses,
        "failure": result.failure, "answers": answers, "judge": details(result),
    }  # fmt: skip


def append(file: IO[str], row: Row) -> Row:
    """Write a row at the end of a file and return it."""
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()
    return row


@contextlib.contextmanager
def bar(total: int, done: int) -> Iterator[Any]:
    """Show a bar with failures, cost and time left, and yield the function that moves it."""
    columns = (
        TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    cost = 0.0
    with Progress(*columns, transient=True, disable=not Console().is_terminal) as progress:
        task = progress.add_task("", total=total, completed=done, note="")

        def advance(result: Judged, failed: int) -> None:
            nonlocal cost
            cost += sum(answer.cost for answer in result.answers)
            note = f"{failed} failed" if failed else ""
            progress.update(task, advance=1, note=" ".join(filter(None, [note, f"cost {cost:.2f}" if cost else ""])))

        yield advance


TITLES = {
    "accuracy": "agrees with the labels of the rows",
    "accuracy_single_order": "the same by one order only",
    "first_shown": "prefers the response shown first",
    "flips": "verdict changes with the order",
    "ties": "ties",
    "longer": "prefers the longer response",
    "longer_in_rows": "the rows prefer the longer response",
    "self_consistency": "two samples agree",
}


def show(name: str, table: dict[str, Interval], metrics: dict[str, Any]) -> None:
    """Print the figures with their intervals, and what it took."""
    title = f"{metrics['judged']} comparisons judged, {metrics['failed']} failed"
    printed = Table("", "value", "95%", title=title)
    for key, (value, low, high) in table.items():
        printed.add_row(TITLES[key], f"{value:.3f}", f"{low:.3f} .. {high:.3f}" if math.isfinite(low) else "one prompt")
    for key in ("unreadable", "refusals", "errors"):
        printed.add_row(f"questions: {key}", f"{metrics[key]:g} of {metrics['questions']:g}", "")
    for key in ("verdict_mass", "calibration_error", "calibration_error_after", "temperature"):
        if key in metrics:
            printed.add_row(key.replace("_", " "), f"{metrics[key]:.3g}", "")
    printed.add_row("tokens read, written", f"{metrics['prompt_tokens']:g}, {metrics['completion_tokens']:g}", "")
    if metrics["cost"]:
        printed.add_row("cost", f"{metrics['cost']:.4g}", "")
    if "perf/comparisons_per_s" in metrics:  # not all were in the cache
        printed.add_row("comparisons per second", f"{metrics['perf/comparisons_per_s']:.3g}", "")
    say(f"judge       {name}")
    Console().print(printed)


def say(line: str) -> None:
    """Print a line as it is."""
    Console().print(line, highlight=False, markup=False, soft_wrap=True)
