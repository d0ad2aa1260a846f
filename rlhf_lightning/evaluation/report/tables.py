"""The figures of stored tables: a row of `FIGURES` for each. A new one is a function and a row.

The function gets rows that have the columns which its row of `FIGURES` asks for, and draws what is in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rlhf_lightning.evaluation.plots import Panel, Series, forest, lines, panels, short
from rlhf_lightning.evaluation.report.figures import Drawn, Looks
from rlhf_lightning.evaluation.report.store import Results, column, number, visible
from rlhf_lightning.ops.statistics import Interval

Row = Mapping[str, Any]
Plot = tuple[str, Any]
"""What a figure is of, such as a model's name or nothing, and the matplotlib figure."""
MOST_BARS, MOST_PLOTS, MOST_POINTS = 48, 12, 2000
"""Of a plot, of a table, and of all plots of a table."""
FEW = 12
"""Points of a line that are drawn one by one; the intervals of more are drawn as a band."""
ENDS = ("low", "high")
OF_LENGTH_CONTROLLED = ("length_controlled_low", "length_controlled_high")


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
        groups.setdefault(", ".join(visible(row[column]) for column in columns if column in row), []).append(row)
    return groups


def interval(row: Row, name: str, ends: Sequence[str] = ENDS) -> Interval:
    """Return the value in one column with the ends of its interval in two others, NaN where the row has none."""
    value, low, high = (column([row], key)[0] for key in (name, *ends))
    return value, low, high


def curve(name: str, rows: Sequence[Row], x: str, y: str, look: int, ends: Sequence[str] = ENDS) -> Series:
    """Return the line of rows from the smallest x to the largest; of many points the intervals are a band."""
    rows = sorted(rows, key=lambda row: row[x])
    across, up, low, high = (column(rows, key) for key in (x, y, *ends))
    return Series(name, across, up, low, high, look=look, points=len(rows) <= FEW)


def calibration(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
    """Yield the reliability diagram: observed share against predicted probability."""
    models = by(rows, "model").items()
    series = [curve(name, of, "predicted", "observed", looks.get(name, 0)) for name, of in models]
    yield "", lines(series, "predicted probability", "observed share", diagonal=True)


def buckets(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
    """Yield the accuracy by bucket, a plot per model and kind of bucket."""
    for name, of in by(rows, "model", "by").items():
        counted = [
            (f"{short(visible(row['bucket']), 28)} ({visible(row.get('count', '?'))})", row) for row in of[:MOST_BARS]
        ]
        bars = [(bucket, interval(row, "accuracy")) for bucket, row in counted]
        look = [looks.get(visible(of[0]["model"]), 0)] * len(bars)
        yield cut(name, of), forest(bars, "pair accuracy; the number of pairs in brackets", looks=look, zero=0.5)


def cut(name: str, rows: Sequence[Row]) -> str:
    """Return the name of a plot, which says so where not all rows are drawn."""
    return name if len(rows) <= MOST_BARS else f"{name}, {MOST_BARS} of {len(rows)}"


def effects(value: str, name: str, x_label: str) -> Callable[[Sequence[Row], Looks], Iterator[Plot]]:
    """Return what yields signed effects with their intervals, the largest first, a plot per model."""

    def draw(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
        for model, of in by(rows, "model").items():
            largest = sorted(of, key=lambda row: -abs(row[value]))[:MOST_BARS]
            bars = [(visible(row[name]), interval(row, value)) for row in largest]
            yield cut(model, of), forest(bars, x_label, looks=[looks.get(model, 0)] * len(bars), zero=0.0)

    return draw


def win_rates(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
    """Yield the win rates by what decided, a plot for each."""
    for decided, of in by(rows, "by").items():
        bars: list[tuple[str, Interval]] = []
        for row in of[:MOST_BARS]:
            name = f"{visible(row['model'])} over {visible(row['opponent'])}"
            bars.append((name, interval(row, "win_rate")))
            if number(row.get("length_controlled")) is not None:
                bars.append((f"{name}, length-controlled", interval(row, "length_controlled", OF_LENGTH_CONTROLLED)))
        yield cut(f"by {decided}", of), forest(bars, "win rate", zero=0.5)


def ratings(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
    """Yield the ratings, the highest first, a plot for each kind of comparison."""
    for decided, of in by(rows, "by").items():
        ordered = sorted(of, key=lambda row: -row["rating"])[:MOST_BARS]
        bars = [(visible(row["model"]), interval(row, "rating")) for row in ordered]
        look = [looks.get(name, 0) for name, _ in bars]
        yield cut(f"by {decided}", of), forest(bars, "rating (Elo points)", looks=look)


def overoptimization(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
    """Yield proxy and gold reward against the square root of KL, a plot per method."""
    rows = [{**row, "distance": math.sqrt(max(row["kl"], 0.0))} for row in rows]
    rewards = {"proxy reward": ("proxy_reward", ("proxy_low", "proxy_high")), "gold reward": ("gold_reward", ENDS)}
    for method, of in by(rows, "method").items():
        plots = []
        for label, (reward, ends) in rewards.items():
            known = by((row for row in of if number(row.get(reward)) is not None), "proxy", "seed")
            series = [curve(name, m, "distance", reward, look, ends) for look, (name, m) in enumerate(known.items())]
            plots += [Panel(label, series)] if series else []
        yield method, panels(plots, "square root of KL (nats)")


def frontier(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
    """Yield reward against KL, a line per method and proxy."""
    found = by(rows, "method", "proxy").items()
    series = [curve(name, of, "kl", "reward", look) for look, (name, of) in enumerate(found)]
    yield "", lines(series, "KL (nats)", "reward")


def positions(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
    """Yield the KL by the position of the token, a line per model."""
    series = [curve(name, of, "position", "kl", looks.get(name, 0)) for name, of in by(rows, "model").items()]
    yield "", lines(series, "position in the response (tokens)", "KL (nats per token)")


def probes(rows: Sequence[Row], looks: Looks) -> Iterator[Plot]:
    """Yield the metrics of each probe with their intervals, a plot per probe, the models of a metric together."""
    for probe, of in by(rows, "probe").items():
        together = [row for members in by(of, "metric").values() for row in members][:MOST_BARS]
        bars = [(f"{visible(row['metric'])}, {visible(row['model'])}", interval(row, "value")) for row in together]
        yield cut(probe, of), forest(bars, "value", looks=[looks.get(visible(row["model"]), 0) for row in together])


DIAGNOSE = "stage=evaluate on a reward model, with evaluate.preferences"
FIGURES = (
    Figured(
        "overoptimization", "Overoptimization", overoptimization,
        "Where the proxy goes on rising while the gold reward turns, the policy exploits its reward model "
        "(Gao et al. 2022, arXiv 2210.10760).",
        "stage=overoptimize", ("kl", "proxy_reward"), ("method", "proxy"),
    ),
    Figured(
        "frontier", "Frontier of reward and KL", frontier, "Higher at the same KL is better.",
        "stage=overoptimize", ("kl", "reward"), ("method",),
    ),
    Figured(
        "calibration", "Reliability of the reward model", calibration,
        "On the diagonal its probabilities are the shares that are observed; a flatter curve is overconfident, a "
        "steeper one underconfident.",
        DIAGNOSE, ("predicted", "observed", "low", "high"),
    ),
    Figured(
        "margins", "Accuracy by margin", buckets, "Larger margins should be right more often; 0.5 is chance.",
        DIAGNOSE, ("accuracy",), ("model", "bucket"),
    ),
    Figured(
        "lengths", "Accuracy by length", buckets,
        "A reward model that goes by length is right only where the better response is the longer one.",
        DIAGNOSE, ("accuracy",), ("model", "bucket"),
    ),
    Figured(
        "sources", "Accuracy by source", buckets, "", DIAGNOSE, ("accuracy",), ("model", "bucket"),
    ),
    Figured(
        "annotators", "Accuracy by group of annotators", buckets, "",
        DIAGNOSE, ("accuracy",), ("model", "bucket"),
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
        "A KL on the first tokens only is a sign of shallow alignment (Qi et al. 2024, arXiv 2406.05946).",
        "stage=probe probe=shallow", ("position", "kl"),
    ),
)  # fmt: skip


def of_tables(results: Results, looks: Looks) -> Iterator[Drawn]:
    """Yield the figures of all stored tables; name in `results.missing` those that nobody stored."""
    looks = dict(looks)
    absent: dict[str, list[str]] = {}
    for row in FIGURES:
        there = False
        for stage, rows in results.rows(row.table):
            source = f"{stage.name}/tables/{row.table}.jsonl"
            rows = usable(rows, row, source, results.missing.append)
            for name in by(rows, "model") if "model" in row.texts else ():
                looks.setdefault(name, len(looks))  # of a model that no metrics.json names
            for name, figure in islice(row.draw(rows, looks), MOST_PLOTS) if rows else ():
                title = f"{row.title}: {name}" if name else row.title
                there = True
                yield Drawn(title, figure, row.caption, source, stage.command)
        if not there:
            absent.setdefault(row.hint, []).append(row.title)
    results.missing += [f"no table for {', '.join(titles)}: {hint} stores it" for hint, titles in absent.items()]


def usable(rows: Sequence[Row], of: Figured, source: str, complain: Callable[[str], None]) -> list[Row]:
    """Return the rows that have what a figure needs, after a complaint about the others."""
    if len(rows) > MOST_POINTS:
        complain(f"{source}: only the first {MOST_POINTS:,} of {len(rows):,} rows are drawn")
        rows = rows[:MOST_POINTS]
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
        complain(
            f"{source}, row {first}: {reason}; {len(rows) - len(good)} of {len(rows)} rows are left out of the figure"
        )
    return good
