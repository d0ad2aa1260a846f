"""`rlhf stage=simulate`: from the world's candidates to `labels.jsonl`, as a population of annotators labels them."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from rlhf_lightning.data.comparisons import LabeledComparison
from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.simulated import population, simulate
from rlhf_lightning.files import write_json, write_jsonl
from rlhf_lightning.runtime.run import Run


def run(run: Run) -> float | None:
    """Label the comparisons of data.train, write labels.jsonl and metrics.json, and return the monitored metric."""
    options, seed, source = run.options, run.settings["seed"], run.sources["data.train"]
    places, rows = [], []
    for where, row in source.rows():
        if not isinstance(row, dict):
            raise UserError(f"{source.name}, {where}: {row}")
        places.append(where)
        rows.append(row)
    annotators = population(
        options["annotators"],
        options["groups"] or {"balanced": 1.0},
        noise=options["noise"],
        position_bias=options["position_bias"],
        length_bias=options["length_bias"],
        careless=options["careless"],
        ties=options["ties"],
        seed=seed,
    )
    labeled = simulate(
        rows, annotators, labels=options["labels"], size=options["size"], checks=options["checks"], seed=seed,
        where=lambda number: f"{source.name}, {places[number]}",
    )  # fmt: skip
    labels = list(track(labeled, "labeling", transient=True, disable=not Console().is_terminal))
    target = run.folder / "labels.jsonl"
    groups = by_group(labels)
    metrics: dict[str, Any] = {"labels": len(labels), "annotators": len(annotators)}
    metrics["comparisons"] = len({label.comparison.id for label in labels})
    metrics["agreement"] = agreement(labels)
    for group, measured in groups.items():
        metrics |= {f"{group}/{name}": value for name, value in measured.items()}
    metrics["monitor"] = run.settings["monitor"] if run.settings["monitor"] in metrics else "agreement"
    write_jsonl(target, [label.row() for label in labels])
    write_json(run.folder / "metrics.json", metrics)
    show(groups, f"{len(labels)} labels of {metrics['comparisons']} comparisons, agreement {metrics['agreement']:.3f}")
    Console().print(f"labels      {target}", soft_wrap=True)
    return metrics[metrics["monitor"]]


def agreement(labels: list[LabeledComparison]) -> float:
    """Return the share of pairs of annotators of the same comparison who rank it alike, 1 where nobody shares one."""
    shared: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for label in labels:
        if label.check is None:
            shared[label.comparison.id].append(label.ranking)
    pairs = [float(a == b) for rankings in shared.values() for a, b in combinations(rankings, 2)]
    return sum(pairs) / len(pairs) if pairs else 1.0


def by_group(labels: list[LabeledComparison]) -> dict[str, dict[str, float]]:
    """Return for each group its annotators, labels, ties, and the share of check questions answered right."""
    table: dict[str, dict[str, float]] = {}
    for group in dict.fromkeys(str(label.group) for label in labels):
        mine = [label for label in labels if label.group == group]
        checks = [float(label.ranking[label.check] == 0) for label in mine if label.check is not None]
        table[group] = {
            "annotators": len({label.annotator for label in mine}),
            "labels": len(mine),
            "ties": sum(len(set(label.ranking)) == 1 for label in mine) / len(mine),
        } | ({"checks_passed": sum(checks) / len(checks)} if checks else {})
    return table


def show(groups: dict[str, dict[str, float]], title: str) -> None:
    """Print a row per group."""
    columns = list(dict.fromkeys(name for row in groups.values() for name in row))
    printed = Table("group", *(name.replace("_", " ") for name in columns), title=title)
    for group, row in groups.items():
        printed.add_row(group, *(f"{row[name]:.4g}" if name in row else "" for name in columns))
    Console().print(printed)
