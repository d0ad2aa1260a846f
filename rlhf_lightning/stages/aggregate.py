"""`rlhf stage=aggregate`: labels of several annotators, in any known layout, made into rows to train on."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.aggregation import Aggregated, aggregate
from rlhf_lightning.feedback.agreement import agreement
from rlhf_lightning.feedback.exports import FORMATS, data_card, export
from rlhf_lightning.feedback.reading import Labels, read_labels
from rlhf_lightning.files import atomic_path, write_json, write_jsonl
from rlhf_lightning.runtime.run import Run

COUNTS = ("labels", "comparisons", "annotators", "rows", "left_out", "without_a_row")
RESAMPLES = 200
"""Of the items, for the intervals on the data card."""


def run(run: Run) -> float | None:
    """Write preferences.jsonl, further formats, the data card and metrics.json, and print what became of the labels."""
    options = run.options
    if unknown := sorted({*options["formats"]} - {*FORMATS}):  # before any work
        raise UserError(f"aggregate.formats={unknown[0]} is not one of {', '.join(FORMATS)}")
    labels = labels_of(run)
    result = aggregate(
        labels,
        options["method"],
        by_group=options["by_group"],
        reliability=options["reliability"],
        min_labels=options["min_labels"],
    )
    lines = export(result, run.folder, options["formats"])
    with atomic_path(run.folder / "README.md") as temporary:
        temporary.write_text(
            data_card(result, run.sources["data.train"].name, agreement_lines(labels)), encoding="utf-8"
        )
    metrics = figures(result)
    for logger in run.loggers():  # names of annotators are in metrics.json only: not every logger takes them
        logger.log_metrics({name: metrics[name] for name in COUNTS}, 0)
        logger.finalize("success")
    target = run.folder / "preferences.jsonl"
    write_jsonl(target, result.rows)
    write_json(run.folder / "metrics.json", {"monitor": None, **metrics, "dropped": dict(result.dropped)})
    show(result)
    for line in [f"preferences     {target} ({len(result.rows)} rows)", *lines]:
        Console().print(line, markup=False, highlight=False, soft_wrap=True)
    Console().print(f"data card       {run.folder / 'README.md'}", highlight=False, soft_wrap=True)
    return None


def labels_of(run: Run) -> Labels:
    """Return the labels of `data.train`, and print which layouts were recognized and what was left out."""
    data, console = run.settings["data"], Console()
    labels = read_labels(run.sources["data.train"], data["columns"], data["on_bad_row"])
    for name, count in labels.layouts.items():
        console.print(f"recognized {count} rows of layout: {name}", highlight=False, soft_wrap=True)
    for reason, count in labels.left_out.items():
        console.print(f"left out {count} rows or labels: {reason}", style="yellow", markup=False, soft_wrap=True)
    return labels


def plain(name: str) -> str:
    """Return a name of others for a terminal: without control characters, and nothing in it is markup."""
    return escape("".join(c if c.isprintable() else "?" for c in name))


def agreement_lines(labels: Labels) -> list[str]:
    """Return how far the annotators agree, for the data card; nothing without the extra `agreement`."""
    try:
        result = agreement(labels, bootstrap=RESAMPLES, reliability=())
    except UserError:
        return []
    lines = [
        f"* {name}: {value:.3f}" + (f" (95% {low:.3f} to {high:.3f})" if math.isfinite(low) else "")
        for name, (value, low, high) in result.figures.items()
    ]
    return [*lines, *(f"* {note}" for note in result.notes)]


def figures(result: Aggregated) -> dict[str, Any]:
    """Return the counts, and how reliable each annotator is."""
    labels = result.labels
    numbers = (
        len(labels.comparisons),
        len({label.comparison.id for label in labels.comparisons}),
        len({label.annotator for label in labels.comparisons}),
        len(result.rows),
        sum(labels.left_out.values()),
        sum(result.dropped.values()),
    )
    counts: dict[str, Any] = dict(zip(COUNTS, numbers, strict=True))
    for group, model in result.reliability.items():
        prefix = "reliability" if group is None else f"reliability/{group}"
        counts |= {f"{prefix}/{name}": value for name, value in model.annotators.items()}
    return counts


def show(result: Aggregated) -> None:
    """Print what became of the labels, and the annotators' reliability where a model was fitted."""
    counts = figures(result)
    title = f"{result.method}{', by group' if result.by_group else ''}"
    table = Table("", "", title=f"aggregated: {title}", show_header=False)
    for name in ("labels", "comparisons", "annotators", "rows"):
        table.add_row(name, str(counts[name]))
    for reason, count in result.dropped.items():
        table.add_row(f"no row: {reason}", str(count))
    Console().print(table)
    for group, model in result.reliability.items():
        table = Table(
            "annotator", "reliability", title="reliability" if group is None else f"reliability, group {plain(group)}"
        )
        for name, value in sorted(model.annotators.items(), key=lambda item: -item[1]):
            table.add_row(plain(name), f"{value:.3f}")
        Console().print(table)
