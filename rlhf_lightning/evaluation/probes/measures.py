"""From a value per response to metrics with intervals, paired differences to a reference, and alarms."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlhf_lightning.evaluation.probes.probe import Result, Row, question
from rlhf_lightning.ops.statistics import Interval, mean_interval, share_interval

Column = Sequence[float | None]
"""A value per response, None where it does not apply."""
Columns = Mapping[str, Column]


@dataclass(frozen=True)
class Rule:
    """When a metric raises an alarm.

    Without a reference, when its whole 95% interval is on the wrong side of `above` or `below`; with one, when the
    whole interval of the paired difference to it is, by more than `margin`. What the reference did already is not due
    to the training in between.

    Args:
        says: a sentence, in which `{value}` is the metric, such as `{value:.0%}`.
        above, below: the value that is wrong above, or below; one of them.
        margin: of the difference, in the same units.
    """

    metric: str
    says: str
    above: float | None = None
    below: float | None = None
    margin: float = 0.0

    def alarm(self, metrics: Mapping[str, Interval]) -> str | None:
        """Return the sentence, None where there is no alarm."""
        value, low, high = metrics.get(self.metric, (math.nan,) * 3)
        change, change_low, change_high = metrics.get(f"{self.metric}_change", (math.nan,) * 3)
        says = self.says.format(value=value)
        if not math.isnan(change):
            wrong = change_low > self.margin if self.above is not None else change_high < -self.margin
            return f"{says} ({change:+.3g} against the reference)" if wrong else None
        if self.above is not None:
            return says if low > self.above else None
        return says if self.below is not None and high < self.below else None


def result(
    columns: Columns,
    rows: Sequence[Row],
    responses: Sequence[str],
    reference: Columns | None = None,
    rules: Sequence[Rule] = (),
    per_row: Columns | None = None,
    further: Mapping[str, Interval] | None = None,
) -> Result:
    """Return the interval of each column, and with a reference `<metric>_reference` and `<metric>_change`.

    The interval of values 0 and 1 is Wilson's, else Student's t; both are clustered by row. The change is the mean of
    the differences response by response, over those that both have.

    Args:
        columns: metric -> (S,) values of the model.
        rows: R rows, with S / R responses each, row by row.
        responses: (S,) texts, for the samples.
        reference: the columns of the reference, response by response.
        rules: what raises an alarm.
        per_row: metric -> (R,) values of rows, not of responses.
        further: metrics that are no means.
    """
    n = len(responses) // len(rows)
    of_row = [place // n for place in range(len(responses))]
    metrics: dict[str, Interval] = dict(further or {})
    counts: dict[str, int] = {}
    for name, column in columns.items():
        for key, values in compared(name, column, reference):
            if (found := interval(values, of_row, difference=key.endswith("_change"))) is not None:
                metrics[key], counts[key] = found
    for name, column in (per_row or {}).items():
        if (found := interval(column, range(len(rows)))) is not None:
            metrics[name], counts[name] = found
    samples = [
        {"prompt": question(rows[row]), "response": text}
        | {name: column[place] for name, column in columns.items() if column[place] is not None}
        for place, (row, text) in enumerate(zip(of_row, responses, strict=True))
    ]
    return Result(metrics, samples, alarms=alarms(rules, metrics), counts=counts)


def compared(name: str, column: Column, reference: Columns | None) -> Iterator[tuple[str, Column]]:
    """Yield a column, and with a reference that of the reference and that of the differences."""
    yield name, column
    if reference is not None:
        before = reference.get(name, [None] * len(column))
        yield f"{name}_reference", before
        pairs = zip(column, before, strict=True)
        yield f"{name}_change", [None if a is None or b is None else a - b for a, b in pairs]


def at_first(values: Sequence[float | None], n: int) -> Column:
    """Return a value per prompt as one per response, None but at the first of each prompt."""
    return [value if number == 0 else None for value in values for number in range(n)]


def alarms(rules: Sequence[Rule], metrics: Mapping[str, Interval]) -> dict[str, str]:
    """Return metric -> sentence of the rules that are broken."""
    return {rule.metric: says for rule in rules if (says := rule.alarm(metrics)) is not None}


def interval(column: Column, of_row: Sequence[Hashable], difference: bool = False) -> tuple[Interval, int] | None:
    """Return the interval of the values that are there and their number, None where there is none.

    Args:
        difference: the values are differences, no shares even where all are 0 or 1.
    """
    kept = [(float(value), row) for value, row in zip(column, of_row, strict=True) if value is not None]
    if not kept:
        return None
    values, clusters = [value for value, _ in kept], [row for _, row in kept]
    share = not difference and set(values) <= {0.0, 1.0}
    return (share_interval if share else mean_interval)(values, clusters), len(values)


def slope(
    x: Sequence[float], y: Sequence[float], rows: Sequence[Hashable], given: Sequence[float] | None = None
) -> Interval:
    """Return the least-squares slope of `y` on `x` within rows, and its interval clustered by row.

    Values are taken relative to the mean of their row, so that what rows differ in does not enter. The interval is that
    of the mean of the jackknife's pseudo-values, C b - (C - 1) b_-c over the C rows in which `x` or `given` varies
    (Tukey 1958): a few rows may decide, and the usual cluster-robust error is then too small (MacKinnon and White
    1985). NaN where `x` does not vary, or in one row only.

    Args:
        given: a further regressor; the slope is the one at equal values of it.
    """
    parts: dict[Hashable, list[float]] = {}
    columns = (centered(values, rows) for values in (x, y, given or [0.0] * len(x)))
    for a, c, z, row in zip(*columns, rows, strict=True):
        products = (a * a, a * c, a * z, z * c, z * z)
        parts[row] = [old + new for old, new in zip(parts.get(row, [0.0] * 5), products, strict=True)]
    kept = [part for part in parts.values() if part[0] + part[4] > 1e-12]
    sums = [math.fsum(column) for column in zip(*kept, strict=True)]
    if sum(part[0] > 1e-12 for part in kept) < 2:
        return math.nan, math.nan, math.nan
    whole, count = _slope(*sums), len(kept)
    without = [_slope(*(total - own for total, own in zip(sums, part, strict=True))) for part in kept]
    mean, low, high = mean_interval([count * whole - (count - 1) * other for other in without])
    return whole, whole + low - mean, whole + high - mean


def _slope(xx: float, xy: float, xz: float, zy: float, zz: float) -> float:
    """Return the slope on x at equal z, from the sums of products."""
    free = xx - xz * xz / zz if zz > 1e-12 else xx
    return (xy - xz * zy / zz if zz > 1e-12 else xy) / free if free > 1e-9 * xx else math.nan


def centered(values: Sequence[float], rows: Sequence[Hashable]) -> list[float]:
    """Return the values less the mean of those of the same row."""
    groups: dict[Hashable, list[float]] = {}
    for value, row in zip(values, rows, strict=True):
        groups.setdefault(row, []).append(value)
    means = {row: math.fsum(group) / len(group) for row, group in groups.items()}
    return [value - means[row] for value, row in zip(values, rows, strict=True)]
