"""`rlhf stage=agreement`: how far annotators agree, and what is known of each annotator and group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf_lightning.callbacks.loggers import log_table
from rlhf_lightning.feedback.agreement import Agreement, agreement
from rlhf_lightning.feedback.annotators import Profile
from rlhf_lightning.files import write_json
from rlhf_lightning.ops.statistics import Interval, as_metrics
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages.aggregate import labels_of, plain

HEADER: tuple[str, ...] = ("figure", "value", "95%")
MOST_PAIRS = 20
"""Pairs of annotators that are printed, those who agree least; metrics.json has all."""

WIDE = 170


def run(run: Run) -> float | None:
    """Print the figures, write metrics.json, and return the monitored one."""
    options = run.options
    result = agreement(
        labels_of(run),
        bootstrap=options["bootstrap"],
        reliability=options["reliability"],
        seed=run.settings["seed"],
        bar=True,
    )
    metrics = figures(result)
    monitor = run.settings["monitor"]
    for logger in run.loggers():
        logger.log_metrics(
            {name: metrics[name] for name in ("items", "shared_items", *result.figures) if name in metrics}, 0
        )
        if result.figures:
            rows: list[dict[str, str]] = [dict(zip(HEADER, line, strict=True)) for line in lines(result)]
            log_table(logger, "agreement", rows, markdown(result), 0)
        logger.finalize("success")
    metrics["monitor"] = monitor if monitor in metrics else next(iter(result.figures), None)
    write_json(run.folder / "metrics.json", metrics | {"notes": result.notes})
    console = Console()
    if console.width < WIDE and not console.is_terminal:
        console = Console(width=WIDE)  # a log is not folded
    for table in tables(result):
        console.print(table)
    for note in result.notes:
        Console().print(note, style="yellow", markup=False, soft_wrap=True)
    Console().print(f"run         {run.folder}", highlight=False, soft_wrap=True)
    return metrics.get(str(metrics["monitor"]))


def figures(result: Agreement) -> dict[str, Any]:
    """Return every figure and end of an interval by name."""
    metrics: dict[str, Any] = {"items": result.items, "shared_items": result.shared}
    add(metrics, "", result.figures)
    for (one, other), (value, count) in result.pairs.items():
        add(metrics, f"pair/{one}/{other}/", {"cohen_kappa": (value, math.nan, math.nan)})
        metrics[f"pair/{one}/{other}/units"] = count
    for kind, profiles in (("annotator", result.annotators), ("group", result.groups)):
        for name, profile in profiles.items():
            metrics[f"{kind}/{name}/labels"] = profile.labels
            if profile.seconds is not None:
                metrics[f"{kind}/{name}/seconds"] = profile.seconds
            add(metrics, f"{kind}/{name}/", shares(profile))
    add(metrics, "", {f"groups/{one}/{other}": value for (one, other), value in result.between.items()})
    for model, values in result.reliability.items():
        metrics |= {f"annotator/{name}/{model}": value for name, value in values.items()}
    return metrics


def add(metrics: dict[str, Any], prefix: str, values: dict[str, Interval]) -> None:
    """Add figures that are defined, with the ends of their intervals where there are any."""
    for name, value in values.items():
        metrics |= as_metrics(f"{prefix}{name}", value)


def shares(profile: Profile) -> dict[str, Interval]:
    """Return the shares of a profile that are known."""
    known = {name: getattr(profile, name) for name in ("agreement", "earlier", "longer", "ties", "checks")}
    return {name: value for name, value in known.items() if value is not None}


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(result: Agreement) -> Iterator[Table]:
    """Yield what is printed."""
    if result.figures:
        table = Table(*HEADER, title=f"agreement: {result.shared} of {result.items} items have several labels")
        for line in lines(result):
            table.add_row(*line)
        yield table
    if len(result.pairs) > 1:
        title = (
            f"Cohen's kappa, the lowest of {len(result.pairs)}" if len(result.pairs) > MOST_PAIRS else "Cohen's kappa"
        )
        table = Table("annotators", "kappa", "shared", title=title)
        for (one, other), (value, count) in sorted(result.pairs.items(), key=lambda item: item[1][0])[:MOST_PAIRS]:
            table.add_row(plain(f"{one}, {other}"), f"{value:.3f}", str(count))
        yield table
    yield profiles("annotator", result.annotators, result.reliability)
    if result.groups:
        yield profiles("group", result.groups, {})
    if len(result.groups) > 1:
        table = Table("groups", "agree", title="share of pairs of labels that agree, within and between groups")
        for (one, other), value in result.between.items():
            table.add_row(plain(one if one == other else f"{one}, {other}"), cell(value))
        yield table


def lines(result: Agreement) -> list[tuple[str, str, str]]:
    """Return the figures as texts: name, value, interval."""
    return [
        (name, f"{value:.3f}", f"{low:.3f} .. {high:.3f}" if math.isfinite(low) else "none")
        for name, (value, low, high) in result.figures.items()
    ]


def markdown(result: Agreement) -> str:
    """Return the figures as a table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [HEADER, ["---"] * len(HEADER), *lines(result)])


def profiles(kind: str, of: dict[str, Profile], reliability: dict[str, dict[str, float]]) -> Table:
    """Return the table of annotators or groups, without columns that nobody has a value of."""
    columns: dict[str, list[str]] = {kind: list(map(plain, of)), "labels": [str(p.labels) for p in of.values()]}
    titles = {"agreement": "agrees", "earlier": "earlier", "longer": "longer", "ties": "ties", "checks": "checks"}
    for name, title in titles.items():
        columns[title] = [cell(getattr(profile, name)) for profile in of.values()]
    columns["seconds"] = ["" if p.seconds is None else f"{p.seconds:.0f}" for p in of.values()]
    for model, values in reliability.items():
        columns[model] = [f"{values[name]:.2f}" if name in values else "" for name in of]
    columns = {title: texts for title, texts in columns.items() if any(texts)}
    table = Table(*columns, title=f"{kind}s")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def cell(value: Interval | None) -> str:
    """Return a share and its interval as a text."""
    if value is None:
        return ""
    share, low, high = value
    return f"{share:.2f} ({low:.2f} .. {high:.2f})" if math.isfinite(low) else f"{share:.2f}"
