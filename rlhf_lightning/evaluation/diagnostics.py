"""What the scores of held-out pairs say about a reward model: where it is right, how sure it is, what length does.

No response is scored again. What a reward model does with changed responses: :mod:`rlhf_lightning.evaluation.changes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from torchmetrics.classification import BinaryCalibrationError

from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.evaluation.reward_model import ScoredPair, ScoredRow, scored_pairs
from rlhf_lightning.ops.ranking import pairs_in_order
from rlhf_lightning.ops.statistics import Interval, as_columns, correlation_interval, mean_interval, share_interval

BINS = 10
"""Bins of the reliability diagram."""
BUCKETS = 5
SOURCES = ("source", "subset", "dataset", "family")
"""Columns that say where a row comes from, the first that rows have."""
Row = dict[str, Any]


@dataclass
class Diagnosis:
    """Metrics, name -> (mean, low, high), and tables, name -> rows."""

    metrics: dict[str, Interval] = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)

    def __or__(self, other: Diagnosis) -> Diagnosis:
        """Return both; the rows of a table that both have follow each other."""
        tables = {
            name: [*self.tables.get(name, []), *other.tables.get(name, [])] for name in self.tables | other.tables
        }
        return Diagnosis(self.metrics | other.metrics, tables)


def diagnose(rows: Sequence[ScoredRow], source_column: str | None = None) -> Diagnosis:
    """Return accuracy by margin, length, source and annotator, calibration, and what length does to the score.

    Args:
        source_column: the column that says where a row comes from; None is the first of `SOURCES` that rows have.

    Raises:
        UserError: no row has the column.
    """
    pairs = scored_pairs(rows)
    tables = {
        "margins": margins(pairs),
        "lengths": lengths(pairs),
        "sources": sources(pairs, source_column),
        "annotators": annotators(pairs),
    }
    found = Diagnosis({}, {name: table for name, table in tables.items() if table})
    return found | calibration(pairs) | length_bias(rows, pairs)


# ---- accuracy by buckets ---------------------------------------------------------------------------------------------


def accuracy_by(pairs: Sequence[ScoredPair], bucket: Callable[[ScoredPair], Any], **columns: Any) -> list[Row]:
    """Return for each bucket of pairs `bucket`, `count`, `accuracy`, `low` and `high`; pairs without one are left out.

    A bucket is a text; an (order, text) is sorted by its order.
    """
    members: dict[Any, list[ScoredPair]] = {}
    for pair in pairs:
        if (name := bucket(pair)) is not None:
            members.setdefault(name, []).append(pair)
    table = []
    for name in sorted(members, key=lambda name: name if isinstance(name, tuple) else (0, str(name))):
        correct = pairs_in_order(torch.tensor([pair.gap for pair in members[name]], dtype=torch.float64)).tolist()
        share = share_interval(correct, [pair.row.prompt for pair in members[name]])
        text = name[1] if isinstance(name, tuple) else str(name)
        table.append(columns | {"bucket": text, "count": len(correct)} | as_columns("accuracy", share))
    return table


def in_quantiles(pairs: Sequence[ScoredPair], value: Callable[[ScoredPair], float], digits: int) -> list[Any]:
    """Return the bucket of each pair: its fifth of the values, as (number, "from to to")."""
    values = np.array([value(pair) for pair in pairs])
    edges = np.unique(np.quantile(values, np.linspace(0, 1, BUCKETS + 1)))
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(len(edges) - 2, 0))
    texts = [f"{low:z.{digits}f} to {high:z.{digits}f}" for low, high in pairwise(edges)]
    texts = texts or [f"{edges[0]:z.{digits}f}"]
    return [(int(place), texts[place]) for place in places]


def bucketed(
    pairs: Sequence[ScoredPair], value: Callable[[ScoredPair], float], digits: int, **columns: Any
) -> list[Row]:
    """Return the accuracies by fifths of a value."""
    if not pairs:
        return []
    by_pair = dict(zip(map(id, pairs), in_quantiles(pairs, value, digits), strict=True))
    return accuracy_by(pairs, lambda pair: by_pair[id(pair)], **columns)


def margins(pairs: Sequence[ScoredPair]) -> list[Row]:
    """Return accuracies by the size of the score difference, and by the margin that the rows give where they do.

    `by` is "score", in standard deviations of the scores of the reward model's validation rows, or "row".
    """
    table = bucketed(pairs, lambda pair: abs(pair.gap), 2, by="score")
    if len({pair.row.margin for pair in pairs}) > 1:
        given = sorted({pair.row.margin for pair in pairs})
        if len(given) <= 2 * BUCKETS:
            table += accuracy_by(pairs, lambda pair: (pair.row.margin, f"{pair.row.margin:g}"), by="row")
        else:
            table += bucketed(pairs, lambda pair: pair.row.margin, 2, by="row")
    return table


def lengths(pairs: Sequence[ScoredPair]) -> list[Row]:
    """Return accuracies by length in characters.

    `by` is "length", the mean of both responses, or "difference", that of the better response less the worse one's.
    """

    def sizes(pair: ScoredPair) -> tuple[int, int]:
        return len(pair.texts.better), len(pair.texts.worse)

    mean = bucketed(pairs, lambda pair: sum(sizes(pair)) / 2, 0, by="length")
    return mean + bucketed(pairs, lambda pair: sizes(pair)[0] - sizes(pair)[1], 0, by="difference")


def sources(pairs: Sequence[ScoredPair], column: str | None = None) -> list[Row]:
    """Return accuracies by where the rows come from; nothing where they do not say.

    Raises:
        UserError: no row has `column`.
    """
    known = list(dict.fromkeys(name for pair in pairs for name in pair.row.columns))
    if column is not None and column not in known:
        raise UserError(f"evaluate.source_column={column}: the rows have {', '.join(known)}.{nearest(column, known)}")
    name = column or next((name for name in SOURCES if name in known), None)
    return accuracy_by(pairs, lambda pair: pair.row.columns.get(name), by=name) if name else []


def annotators(pairs: Sequence[ScoredPair]) -> list[Row]:
    """Return accuracies by the group of annotators that rows name; where none does, by annotator."""
    by_group = accuracy_by(pairs, lambda pair: pair.row.group, by="group")
    return by_group or accuracy_by(pairs, lambda pair: pair.row.columns.get("annotator"), by="annotator")


# ---- calibration -----------------------------------------------------------------------------------------------------


def calibration(pairs: Sequence[ScoredPair]) -> Diagnosis:
    """Return expected calibration error, Brier score and reliability diagram of sigma(score difference).

    Both orders of every pair are counted, so that nothing depends on which response is named first: the diagram is
    symmetric around (0.5, 0.5). In a bin `predicted` is the mean probability that the first response of an ordered pair
    is better, `observed` the share in which it is. The Brier score is the mean of (1 - p)^2 (Brier 1950), 0.25 without
    knowledge; the calibration error is above 0 by chance, the more so the fewer pairs there are.
    """
    if not pairs:
        return Diagnosis()
    chances, prompts = expit(np.array([pair.logit for pair in pairs])), [pair.row.prompt for pair in pairs]
    forecasts, outcomes = np.concatenate([chances, 1 - chances]), np.repeat([1, 0], len(pairs))
    error = BinaryCalibrationError(n_bins=BINS, norm="l1")(torch.from_numpy(forecasts), torch.from_numpy(outcomes))
    bins = np.minimum((forecasts * BINS).astype(int), BINS - 1)
    table = []
    for number in range(BINS):
        if len(places := np.flatnonzero(bins == number)):
            owners = [prompts[place % len(pairs)] for place in places]
            share = share_interval(outcomes[places].tolist(), owners)
            table.append(
                {
                    "bin_low": number / BINS,
                    "bin_high": (number + 1) / BINS,
                    "count": len(places),
                    "predicted": float(forecasts[places].mean()),
                }
                | as_columns("observed", share)
            )
    brier = mean_interval(((1 - chances) ** 2).tolist(), prompts)
    return Diagnosis({"calibration_error": (float(error), math.nan, math.nan), "brier": brier}, {"calibration": table})


# ---- length ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LengthEffect:
    """What length adds to a score: `linear` per character, and `logarithmic` per logarithm of one more than these."""

    linear: float
    logarithmic: float

    def __call__(self, text: str) -> float:
        """Return what the length of a text adds, up to a constant."""
        return self.linear * len(text) + self.logarithmic * math.log1p(len(text))


def fit_length(pairs: Sequence[ScoredPair]) -> LengthEffect:
    """Return the least-squares fit of score differences within prompts to differences of length and of its logarithm.

    A regression of scores on length with an intercept for every pair: what the prompts differ in does not enter. It
    takes all of the linear relation away, also where longer responses are better for good reasons.
    """
    sizes = np.array([[len(text) for text in (pair.texts.better, pair.texts.worse)] for pair in pairs], float)
    features = np.stack([sizes[:, 0] - sizes[:, 1], np.log1p(sizes[:, 0]) - np.log1p(sizes[:, 1])], 1)
    scale = np.maximum(np.abs(features).max(0), 1e-12)  # of one size, for the precision of the solution
    weights, *_ = np.linalg.lstsq(features / scale, np.array([pair.gap for pair in pairs]), rcond=1e-10)
    linear, logarithmic = (weights / scale).tolist()
    return LengthEffect(linear, logarithmic)


def length_bias(rows: Sequence[ScoredRow], pairs: Sequence[ScoredPair]) -> Diagnosis:
    """Return the correlation of score and length in characters, and the accuracy with the effect of length taken out.

    The correlations, Pearson's and Spearman's, are over all responses, with rows of one prompt as clusters.
    """
    if not pairs:
        return Diagnosis()
    scores = [score for row in rows for score in row.scores]
    sizes = [float(len(text)) for row in rows for text in row.responses]
    prompts = [row.prompt for row in rows for _ in row.responses]
    found = {f"length_{kind}": correlation_interval(scores, sizes, prompts, kind) for kind in ("pearson", "spearman")}
    effect = fit_length(pairs)
    gaps = [pair.gap - (effect(pair.texts.better) - effect(pair.texts.worse)) for pair in pairs]
    correct = pairs_in_order(torch.tensor(gaps, dtype=torch.float64)).tolist()
    found["length_controlled_accuracy"] = share_interval(correct, [pair.row.prompt for pair in pairs])
    return Diagnosis({name: value for name, value in found.items() if not math.isnan(value[0])})
