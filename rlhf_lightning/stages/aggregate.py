"""`rlhf stage=aggregate`: labels of several annotators, in any known layout, made into rows to train on."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.aggregation import Aggregated, aggregate
from rlhf_lightning.feedback.exports import FORMATS, data_card, export
from rlhf_lightning.feedback.reading import Labels, read_labels
from rlhf_lightning.files import atomic_path, write_json, write_jsonl
from rlhf_lightning.runtime.run import Run


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
        temporary.write_text(data_card(result, run.sources["data.train"].name), encoding="utf-8")
    metrics = figures(result)
    for logger in run.loggers():
        logger.log_metrics(metrics, 0)
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


def figures(result: Aggregated) -> dict[str, Any]:
    """Return the counts, and how reliable each annotator is."""
    labels = result.labels
    counts = {
        "labels": len(labels.comparisons),
        "comparisons": len({label.comparison.id for label in labels.comparisons}),
        "annotators": len({label.annotator for label in labels.comparisons}),
        "rows": len(result.rows),
        "left_out": sum(labels.left_out.values()),
        "without_a_row": sum(result.dropped.values()),
    }
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
            "annotator", "reliability", title="reliability" if group is None else f"reliability, group {group}"
        )
        for name, value in sorted(model.annotators.items(), key=lambda item: -item[1]):
            table.add_row(name, f"{value:.3f}")
        Console().print(table)
