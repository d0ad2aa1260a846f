"""The figures of a report: a row of `FIGURES` for each, from a stored table or from stored metrics to what is drawn.

A new figure of a table is a function and a row. It gets rows whose columns are what the row of `FIGURES` asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_lightning.evaluation.plots import Panel, Series, as_svg, cumulative, forest, lines, panels
from rlhf_lightning.evaluation.report.findings import is_difference
from rlhf_lightning.evaluation.report.store import Results, Stage, curves, number, visible
from rlhf_lightning.ops.statistics import Interval

Row = Mapping[str, Any]
Looks = Mapping[str, int]
"""Name of a model -> the number of its colour and marker in all figures."""
Plot = tuple[str, Any]
"""What a figure is of, such as a model's name or nothing, and the matplotlib figure."""
MOST_BARS = 24


@dataclass(frozen=True)
class Drawn:
    """A figure on the page: SVG, what to look at, the files it was drawn from and the command that wrote them."""

    title: str
    svg: str
    caption: str
    source: str
    command: str


@dataclass(frozen=True)
class Figured:
    """A figure of a stored table.

    Args:
        table: the name of `tables/<table>.jsonl`.
        title: of the figure.
        draw: called with the rows and the looks of models; yields one or several plots.
        caption: what to look at.
        hint: how the table is made, where there is none.
        numbers: columns that must be finite numbers; a row without them is left out and named.
        texts: columns that must be there.
    """

    table: str
    title: str
    draw: Callable[[Sequence[Row], Looks], Iterable[Plot]]
    caption: str
    hint: str
    numbers: tuple[str, ...]
    texts: tuple[str, ...] = ("model",)


def by(rows: Iterable[Row], *columns: str) -> dict[str, list[Row]]:
    """Return the rows by the values of columns, in their order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(" ".join(visible(row[column], 60) for column in columns if column in row), []).append(row)
    return groups


def column(rows: Sequence[Row], name: str) -> list[float]:
    """Return a column of numbers, NaN where a row has none."""
    return [math.nan if (value := number(row.get(name))) is None else value for row in rows]


def interval(row: Row, name: str) -> Interval:
    """Return a value with its ends in the columns `low` and `high`, or `<name>_low` and `<name>_high`."""
    own = f"{name}_low" in row
    value, low, high = column([row], name) + column([row], f"{name}_low" if own else "low") + column([row], f"{name}_high" if own else "high")
    return value, low, high


# ---- tables ----------------------------------------------------------------------------------------------------------


def calibration(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
    """Yield the reliability diagram: observed share against predicted probability."""
    series = [
        Series(name, column(of, "predicted"), column(of, "observed"), column(of, "low"), column(of, "high"), look=looks.get(name, 0))
        for name, of in by(rows, "model").items()
    ]
    yield "", lines(series, "predicted probability", "observed share", diagonal=True)


def buckets(x_label: str) -> Callable[[Sequence[Row], Looks], Iterator[Plot]]:
    """Return what yields the accuracy by bucket, a plot per model."""

    def draw(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
        for name, of in by(rows, "model").items():
            bars = [(f"{visible(row['bucket'], 30)} ({row.get('count', '?')})", interval(row, "accuracy")) for row in of[:MOST_BARS]]
            yield name, forest(bars, f"pair accuracy, by {x_label} (pairs)", looks=[looks.get(name, 0)] * len(bars), zero=0.5)

    return draw


def effects(value: str, name: str, x_label: str) -> Callable[[Sequence[Row], Looks], Iterator[Plot]]:
    """Return what yields signed effects with their intervals, the largest first, a plot per model."""

    def draw(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
        for model, of in by(rows, "model").items():
            largest = sorted(of, key=lambda row: -abs(row[value]))[:MOST_BARS]
            bars = [(visible(repr(row[name]) if name == "ngram" else row[name], 34), interval(row, value)) for row in largest]
            yield model, forest(bars, x_label, looks=[looks.get(model, 0)] * len(bars), zero=0.0)

    return draw


def win_rates(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
    """Yield the win rates by what decided, a plot for each."""
    for decided, of in by(rows, "by").items():
        bars: list[tuple[str, Interval]] = []
        for row in of[:MOST_BARS]:
            name = f"{visible(row['model'], 20)} over {visible(row['opponent'], 20)}"
            bars.append((name, interval(row, "win_rate")))
            if number(row.get("length_controlled")) is not None:
                bars.append((f"{name}, length-controlled", interval_of(row, "length_controlled")))
        yield f"by {decided}", forest(bars, "win rate", zero=0.5)


def interval_of(row: Row, name: str) -> Interval:
    """Return a value with the ends of its own interval, NaN where the row has none."""
    value, low, high = (column([row], key)[0] for key in (name, f"{name}_low", f"{name}_high"))
    return value, low, high


def ratings(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
    """Yield the ratings, the highest first, a plot for each kind of comparison."""
    for decided, of in by(rows, "by").items():
        ordered = sorted(of, key=lambda row: -row["rating"])[:MOST_BARS]
        bars = [(visible(row["model"], 34), interval(row, "rating")) for row in ordered]
        yield f"by {decided}" if decided else "", forest(bars, "rating (Elo points)", looks=[looks.get(n, 0) for n, _ in bars])


def overoptimization(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
    """Yield proxy and gold reward against the square root of KL, a plot per method."""
    for method, of in by(rows, "method").items():
        above, below = [], []
        for look, (proxy, points) in enumerate(by(of, "proxy").items()):
            points = sorted(points, key=lambda row: row["kl"])
            several = len({str(row.get("seed")) for row in points}) > 1
            x = [math.sqrt(max(row["kl"], 0.0)) for row in points]
            above.append(Series(proxy, x, column(points, "proxy_reward"), look=look, line=not several, dashed=True))
            low, high = (column(points, end) if all(end in row for row in points) else [] for end in ("low", "high"))
            below.append(Series(proxy, x, column(points, "gold_reward"), low, high, look=look, line=not several))
        yield method, panels([Panel("proxy reward", above), Panel("gold reward", below)], "sqrt(KL) (sqrt of nats)")


def frontier(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
    """Yield reward against KL, a line per method."""
    series = []
    for look, (method, of) in enumerate(by(rows, "method").items()):
        of = sorted(of, key=lambda row: row["kl"])
        low, high = (column(of, end) if all(end in row for row in of) else [] for end in ("low", "high"))
        series.append(Series(method, column(of, "kl"), column(of, "reward"), low, high, look=look))
    yield "", lines(series, "KL (nats)", "reward")


def positions(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
    """Yield the KL by the position of the token, a line per model."""
    series = [
        Series(name, column(of, "position"), column(of, "kl"), column(of, "low"), column(of, "high"), look=looks.get(name, 0), points=False)
        for name, of in by(rows, "model").items()
    ]
    yield "", lines(series, "position in the response (tokens)", "KL (nats per token)")


def probes(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
    """Yield the metrics of each probe with their intervals, a plot per probe."""
    for probe, of in by(rows, "probe").items():
        bars = [(f"{visible(row['metric'], 24)}, {visible(row['model'], 16)}", interval(row, "value")) for row in of[:MOST_BARS]]
        yield probe, forest(bars, "value", looks=[looks.get(visible(row["model"]), 0) for row in of[:MOST_BARS]])


DIAGNOSE = "stage=evaluate on a reward model, with evaluate.preferences"
FIGURES = (
    Figured(
        "overoptimization", "Overoptimization", overoptimization,
        "Where the proxy goes on rising while the gold reward turns, the policy exploits its reward model "
        "(Gao et al. 2022, arXiv 2210.10760).",
        "stage=overoptimize", ("kl", "proxy_reward", "gold_reward"), ("method", "proxy"),
    ),
    Figured(
        "frontier", "Frontier of reward and KL", frontier, "Higher at the same KL is better.",
        "stage=overoptimize", ("kl", "reward"), ("method",),
    ),
    Figured(
        "calibration", "Reliability of the reward model", calibration,
        "On the diagonal a probability of the reward model is the share that is observed; a flatter curve is overconfident.",
        DIAGNOSE, ("predicted", "observed", "low", "high"),
    ),
    Figured(
        "margins", "Accuracy by margin", buckets("margin"), "Larger margins should be right more often; 0.5 is chance.",
        DIAGNOSE, ("accuracy",), ("model", "bucket"),
    ),
    Figured(
        "lengths", "Accuracy by length", buckets("difference in length"),
        "A reward model that goes by length is right only where the better response is the longer one.",
        DIAGNOSE, ("accuracy",), ("model", "bucket"),
    ),
    Figured(
        "sources", "Accuracy by source", buckets("source"), "", DIAGNOSE, ("accuracy",), ("model", "bucket"),
    ),
    Figured(
        "annotators", "Accuracy by group of annotators", buckets("group"), "", DIAGNOSE, ("accuracy",), ("model", "bucket"),
    ),
    Figured(
        "ngrams", "N-grams that move the score", effects("effect", "ngram", "effect on the score"),
        "A phrase that moves the score whatever is said is one that a policy will learn to repeat.",
        DIAGNOSE, ("effect",), ("model", "ngram"),
    ),
    Figured(
        "paraphrases", "Changes of format", effects("shift", "change", "shift of the score (standard deviations)"),
        "A change that says nothing new should not move the score.",
        DIAGNOSE, ("shift",), ("model", "change"),
    ),
    Figured(
        "win_rates", "Win rates", win_rates, "Ties count half; 0.5 is no difference.",
        "stage=evaluate with a judge, a reward or several files of answers", ("win_rate",), ("model", "opponent", "by"),
    ),
    Figured(
        "ratings", "Ratings", ratings, "", "stage=evaluate of several models with a judge or a reward", ("rating",),
    ),
    Figured(
        "probes", "Probes", probes, "", "stage=probe", ("value",), ("probe", "model", "metric"),
    ),
    Figured(
        "kl_by_position", "KL by position", positions,
        "A KL that is spent on the first tokens only is a sign of shallow alignment (Qi et al. 2024, arXiv 2406.05946).",
        "stage=probe probe=shallow", ("position", "kl"),
    ),
)  # fmt: skip


def of_tables(results: Results, looks: Looks) -> Iterator[Drawn]:
    """Yield the figures of all stored tables; name in `results.missing` those without one."""
    absent: dict[str, list[str]] = {}
    for row in FIGURES:
        there = False
        for stage, rows in results.rows(row.table):
            source = f"{stage.name}/tables/{row.table}.jsonl"
            rows = usable(rows, row, source, results.missing.append)
            for name, figure in row.draw(rows, looks) if rows else ():
                title = f"{row.title}: {name}" if name else row.title
                there = True
                yield Drawn(title, as_svg(figure, title), row.caption, source, stage.command)
        if not there:
            absent.setdefault(row.hint, []).append(row.title)
    results.missing += [f"no table for {', '.join(titles)}: {hint} stores it" for hint, titles in absent.items()]


def usable(rows: Sequence[Row], of: Figured, source: str, complain: Callable[[str], None]) -> list[Row]:
    """Return the rows that have what a figure needs, after a complaint about the others."""
    good, first, reason = [], 0, ""
    for place, row in enumerate(rows, 1):
        lacks = [name for name in of.texts if name not in row]
        no_number = [name for name in of.numbers if number(row.get(name)) is None]
        if not lacks and not no_number:
            good.append(row)
        elif not first:
            first = place
            reason = f"there is no column {lacks[0]}" if lacks else f"{no_number[0]} is no finite number"
    if first:
        complain(f"{source}, row {first}: {reason}; {len(rows) - len(good)} of {len(rows)} rows are left out of the figure")
    return good


# ---- metrics, samples, logs ------------------------------------------------------------------------------------------

REWARDS = {"gold": "gold reward", "reward": "reward model"}


def of_metrics(stage: Stage, looks: Looks) -> Iterator[Drawn]:
    """Yield the figures of a stage that has evaluated models."""
    source = f"{stage.name}/metrics.json"
    models = {name: row for name, row in stage.models.items() if not is_difference(name, stage.models)}
    for metric, title in REWARDS.items():
        rows = {name: row for name, row in models.items() if {metric, "kl"} <= row.keys()}
        if len(rows) > 1:
            series = [
                Series(name, [kl[0]], [y[0]], [y[1]], [y[2]], [kl[1]], [kl[2]], look=looks.get(name, 0), line=False)
                for name, row in rows.items()
                for kl, y in [(row["kl"], row[metric])]
            ]
            caption = "To the right a model is further from the reference; up it is better. Bars are 95% intervals."
            yield drawn(lines(series, "KL to the reference (nats)", title), f"{title.capitalize()} against KL", caption, source, stage)
    gaps = {name: row for name, row in stage.models.items() if name not in models}
    for metric, title in {"gold": "gold reward", "length": "length (tokens)"}.items():
        bars = [(name.replace("-", " − "), row[metric]) for name, row in gaps.items() if metric in row]
        if bars:
            figure = forest(bars, f"paired difference in {title}", looks=[looks.get(n.split(" − ")[0], 0) for n, _ in bars], zero=0.0)
            caption = "An interval that does not touch the line is a difference at the 95% level."
            yield drawn(figure, f"Difference in {title}", caption, source, stage)


def of_samples(stage: Stage, samples: Mapping[str, Sequence[Row]], looks: Looks) -> Iterator[Drawn]:
    """Yield the distribution of lengths of the stored responses."""
    lengths = {visible(name): [x for x in column(rows, "length") if math.isfinite(x)] for name, rows in samples.items()}
    lengths = {name: values for name, values in lengths.items() if values}
    if lengths:
        figure = cumulative(lengths, "length of the response (tokens)", looks)
        caption = "A curve further to the right is of longer answers; a step at the end is of answers cut off there."
        yield drawn(figure, "Lengths of the answers", caption, f"{stage.name}/samples/*.jsonl", stage)


TRAINING = {
    "loss": ("train/loss", "val/loss"),
    "accuracy": ("train/accuracy", "val/accuracy"),
    "reward": ("reward/proxy", "reward/gold"),
    "KL (nats)": ("kl/reference",),
    "tokens": ("rollout/length",),
    "entropy": ("policy/entropy",),
}
"""The plots of a run's training: y label -> the tags in it."""


def of_training(results: Results) -> Iterator[Drawn]:
    """Yield the training curves of every stage that logged some."""
    tags = {tag: label for label, of in TRAINING.items() for tag in of}
    for stage in results.stages:
        if not stage.manifest:
            continue
        found = curves(stage.folder, tags, results.missing.append)
        plots = []
        for label, members in TRAINING.items():
            series = [
                Series(tag, [step for step, _ in found[tag]], [value for _, value in found[tag]], look=look, points=len(found[tag]) == 1)
                for look, tag in enumerate(members)
                if found.get(tag)
            ]
            plots += [Panel(label, series)] if series else []
        if plots:
            logs = "tensorboard" if (stage.folder / "tensorboard").is_dir() else "csv"
            yield drawn(panels(plots, "step"), f"Training: {stage.name}", "", f"{stage.name}/{logs}", stage)


def drawn(figure: Any, title: str, caption: str, source: str, stage: Stage) -> Drawn:
    """Return a figure as it is shown."""
    return Drawn(title, as_svg(figure, title), caption, source, stage.command)
