"""The figures of a report that come from metrics, samples and logs, and what a figure is on the page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rlhf_lightning.callbacks.loggers import CHARTS
from rlhf_lightning.evaluation.plots import Panel, Series, as_svg, cumulative, forest, lines, panels
from rlhf_lightning.evaluation.report.store import Results, Stage, column, curves, split_difference, visible

Looks = Mapping[str, int]
"""Name of a model -> the number of its colour and marker in all figures."""


@dataclass(frozen=True)
class Drawn:
    """A figure of matplotlib's, what to look at, the files it was drawn from and the command that wrote them."""

    title: str
    figure: Any
    caption: str
    source: str
    command: str

    @property
    def svg(self) -> str:
        """The figure for a page."""
        return as_svg(self.figure, self.title)


MOST_CURVES = 12
REWARDS = {"gold": "gold reward", "reward": "reward model"}


def of_metrics(stage: Stage, looks: Looks) -> Iterator[Drawn]:
    """Yield the figures of a stage that has evaluated models."""
    source = f"{stage.name}/metrics.json"
    models = {name: row for name, row in stage.models.items() if not split_difference(name, stage.models)}
    for metric, title in REWARDS.items():
        having = {name: row for name, row in models.items() if {metric, "kl"} <= row.keys()}
        rows = {name: row for name, row in having.items() if name not in stage.earlier}
        if len(rows) > 1:
            series = [
                Series(name, [kl[0]], [y[0]], [y[1]], [y[2]], [kl[1]], [kl[2]], look=looks.get(name, 0), line=False)
                for name, row in rows.items()
                for kl, y in [(row["kl"], row[metric])]
            ]
            caption = "To the right a model is further from the reference; up it is better. Bars are 95% intervals."
            left_out = [f"{name} ({row['kl'][0]:.3g} nats)" for name, row in having.items() if name not in rows]
            if left_out:
                caption += f" Not drawn: {', '.join(left_out)}, which the reference was trained from."
            figure = lines(series, "KL to the reference (nats)", title)
            yield Drawn(f"{title.capitalize()} against KL", figure, caption, source, stage.command)
    pairs = {pair: row for name, row in stage.models.items() if (pair := split_difference(name, stage.models))}
    for metric, title in {"gold": "gold reward", "length": "length (tokens)"}.items():
        known = {pair: row[metric] for pair, row in pairs.items() if metric in row and pair[0] not in stage.earlier}
        if known:
            bars = [(" − ".join(pair), value) for pair, value in known.items()]
            look = [looks.get(model, 0) for model, _ in known]
            figure = forest(bars, f"paired difference in {title}", looks=look, zero=0.0)
            caption = "An interval that does not touch the line is a difference at the 95% level."
            yield Drawn(f"Difference in {title}", figure, caption, source, stage.command)


def of_samples(stage: Stage, samples: Mapping[str, Sequence[Mapping[str, Any]]], looks: Looks) -> Iterator[Drawn]:
    """Yield the distribution of lengths of the stored responses."""
    lengths = {visible(name): [x for x in column(rows, "length") if math.isfinite(x)] for name, rows in samples.items()}
    known = {name: values for name, values in lengths.items() if values}
    lengths = dict(islice(known.items(), MOST_CURVES))
    if lengths:
        looks = dict(looks)
        for name in lengths:
            looks.setdefault(name, len(looks))  # of an answer that no metrics.json has as a model
        figure = cumulative(lengths, "length of the response (tokens)", looks)
        caption = "A curve further to the right is of longer answers; a step at the end is of answers cut off there."
        caption += f" {MOST_CURVES} of {len(known)} models." if len(known) > MOST_CURVES else ""
        yield Drawn("Lengths of the answers", figure, caption, f"{stage.name}/samples/*.jsonl", stage.command)


def of_training(results: Results) -> Iterator[Drawn]:
    """Yield the training curves of every stage that logged some."""
    tags = [tag for members in CHARTS.values() for tag in members]
    for stage in results.stages:
        if not stage.manifest:
            continue
        found = curves(stage.folder, tags, results.missing.append)
        plots = []
        for label, members in CHARTS.items():
            series = []
            for look, tag in enumerate(tag for tag in members if tag in found):
                steps, values = zip(*found[tag], strict=True)
                series.append(Series(tag, steps, values, look=look, points=len(steps) == 1))
            plots += [Panel(label, series)] if series else []
        if plots:
            logs = "tensorboard" if (stage.folder / "tensorboard").is_dir() else "csv"
            yield Drawn(f"Training: {stage.name}", panels(plots, "step"), "", f"{stage.name}/{logs}", stage.command)
