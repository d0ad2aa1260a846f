"""How far annotators agree: percent agreement, Cohen's and Fleiss' kappa, Krippendorff's alpha, with intervals."""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.progress import track

from rlhf_lightning.errors import UserError, check_number, needs
from rlhf_lightning.feedback.annotators import Profile, between_groups, profiles
from rlhf_lightning.feedback.reading import read_labels
from rlhf_lightning.feedback.reliability import MODELS
from rlhf_lightning.feedback.units import Entry, Table, entries, table
from rlhf_lightning.ops.statistics import Interval

FEWEST_ITEMS = 20
"""Items with several labels from which there is an interval: of fewer, a percentile bootstrap covers too little."""
FEWEST_SHARED = 10
"""Units that two annotators share from which there is a Cohen's kappa of the two, and a reliability of one."""
Statistic = Callable[[np.ndarray], float]
"""From (U,) how often each unit is drawn to a figure, NaN where it is not defined."""


@dataclass
class Agreement:
    """What :func:`agreement` finds.

    Args:
        figures: name -> figure with its interval.
        pairs: two annotators -> Cohen's kappa, and the number of units they share.
        annotators: annotator -> what is known of their labels.
        groups: the same for each group, where annotators have one.
        between: two groups -> share of pairs of labels that agree; of a group with itself, within it.
        reliability: model -> annotator -> reliability.
        notes: what was not computed, and why.
        items, shared: items, and those labeled by several annotators.
    """

    figures: dict[str, Interval]
    pairs: dict[tuple[str, str], tuple[float, int]]
    annotators: dict[str, Profile]
    groups: dict[str, Profile]
    between: dict[tuple[str, str], Interval]
    reliability: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    items: int = 0
    shared: int = 0


def agreement(
    labels: Any, *, bootstrap: int = 1000, reliability: Sequence[str] = tuple(MODELS), seed: int = 0, bar: bool = False
) -> Agreement:
    """Return how far annotators agree, and what is known of each of them.

    Of a comparison every two responses are a unit, with the values first better, tie, second better. Alpha for ordinal
    and interval data is of -3 to 3 where labels have a strength, else of -1, 0, 1; labels of items have them where all
    are numbers. Intervals are percentiles of a bootstrap over items (Efron and Tibshirani 1993), so they say nothing of
    other annotators.

    Args:
        labels: anything that :func:`read_labels` takes.
        bootstrap: resamples; 0 gives no intervals.
        reliability: models to fit, "dawid_skene" and "bradley_terry".
        bar: draw a progress bar.

    Raises:
        UserError: labels of comparisons and of single items together, or an option that is none.
    """
    check_number("agreement.bootstrap", bootstrap, "[0, inf)", whole=True)
    if unknown := [name for name in reliability if name not in MODELS]:
        raise UserError(f"agreement.reliability={unknown[0]} is not one of {', '.join(MODELS)}")
    labels = read_labels(labels)
    if labels.comparisons and labels.items:
        raise UserError("these are labels of comparisons and of single items; give one kind at a time")
    listed = entries(labels)
    data, notes = table(listed), list[str]()
    several = data.counts.sum(axis=1) > 1
    shared = len(set(data.cluster[several]))
    pairs = kappas(data, notes)
    figures: dict[str, Interval] = {}
    if not shared:
        notes.append(
            "no item was labeled by two annotators, so there is no agreement to measure; with label.overlap=0.2 "
            "everyone labels the same fifth of the items"
        )
    else:
        computed = statistics(listed, data, list(pairs), notes)
        figures = intervals(computed, data.cluster, several, bootstrap, seed, notes, bar)
    result = Agreement(
        figures, pairs, profiles(listed, lambda e: e.annotator), profiles(listed, lambda e: e.group),
        between_groups(listed), notes=notes, items=len(set(data.cluster)), shared=shared,
    )  # fmt: skip
    known = well_known(data)
    if reliability and shared and (few := len(data.annotators) - len(known)):
        notes.append(f"no reliability of {few} annotators who share fewer than {FEWEST_SHARED} units with others")
    for name in reliability if known else ():
        if labels.comparisons or name == "dawid_skene":
            fitted = MODELS[name](listed).annotators
            result.reliability[name] = {name: value for name, value in fitted.items() if name in known}
    return result


def well_known(data: Table) -> set[str]:
    """Return the annotators who share enough units with others for a figure of their own."""
    several = data.counts.sum(axis=1)[data.unit] > 1
    shared = np.bincount(data.annotator[several], minlength=len(data.annotators))
    return {name for name, count in zip(data.annotators, shared, strict=True) if count >= FEWEST_SHARED}


def statistics(
    listed: Sequence[Entry], data: Table, pairs: Sequence[tuple[str, str]], notes: list[str]
) -> dict[str, Statistic]:
    """Return the figures that the labels allow."""
    counts = data.counts
    found: dict[str, Statistic] = {"percent": lambda drawn: percent(np.repeat(counts, drawn, axis=0))}
    if pairs:
        found["cohen_kappa"] = mean_kappa(data, pairs)
    per_unit = counts.sum(axis=1)
    size, of_size = Counter(per_unit[per_unit > 1].tolist()).most_common(1)[0]
    found["fleiss_kappa"] = lambda drawn: fleiss(np.repeat(counts, drawn * (per_unit == size), axis=0))
    if (left := int((per_unit > 1).sum()) - of_size) > 0:
        notes.append(f"Fleiss' kappa is of the {of_size} units with {size} labels, without {left} with another number")
    found["alpha_nominal"] = lambda drawn: alpha(np.repeat(counts, drawn, axis=0), None, "nominal")
    numbers = as_numbers(listed)
    if numbers is not None:
        values = np.array(numbers.categories, dtype=float)
        strengths = numbers.counts
        for level in ("ordinal", "interval"):
            found[f"alpha_{level}"] = lambda drawn, level=level: alpha(
                np.repeat(strengths, drawn, axis=0), values, level
            )
    return found


def as_numbers(listed: Sequence[Entry]) -> Table | None:
    """Return the labels as numbers, None where they are names."""
    if all(entry.strength is not None for entry in listed):
        return table(listed, strength=True)
    try:
        numbers = [float(entry.value) for entry in listed]
    except (TypeError, ValueError):
        return None
    if not all(map(math.isfinite, numbers)):
        return None
    return table([Entry(e.unit, e.annotator, e.group, x, None, None) for e, x in zip(listed, numbers, strict=True)])


# ---- the figures -----------------------------------------------------------------------------------------------------


def percent(counts: np.ndarray) -> float:
    """Return the mean over units of the share of pairs of their labels that agree.

    Args:
        counts: (U, C) how often each category was given to each unit; units with one label say nothing.
    """
    sizes = counts.sum(axis=1)
    counts, sizes = counts[sizes > 1], sizes[sizes > 1]
    if not len(sizes):
        return math.nan
    return float(((counts * (counts - 1)).sum(axis=1) / (sizes * (sizes - 1))).mean())


def fleiss(counts: np.ndarray) -> float:
    """Return Fleiss' kappa (1971) of units with the same number of labels; NaN where all labels are the same."""
    if not len(counts) or (counts.sum(axis=0) > 0).sum() < 2:
        return math.nan
    return float(needs("statsmodels.stats.inter_rater", "agreement").fleiss_kappa(counts))


def alpha(counts: np.ndarray, values: np.ndarray | None, level: str) -> float:
    """Return Krippendorff's alpha; NaN where all labels are the same.

    Args:
        counts: (U, C) how often each category was given to each unit.
        values: (C,) the categories as numbers, smallest first; None of names.
        level: "nominal", "ordinal" or "interval".
    """
    krippendorff = needs("krippendorff", "agreement")
    counts = counts[counts.sum(axis=1) > 1]
    if not len(counts) or (counts.sum(axis=0) > 0).sum() < 2:
        return math.nan
    domain = np.arange(counts.shape[1]) if values is None else values
    return float(krippendorff.alpha(value_counts=counts, value_domain=domain, level_of_measurement=level))


def kappa(confusion: np.ndarray) -> float:
    """Return Cohen's kappa (1960) of (C, C) counts of two annotators' labels; NaN where all are the same."""
    if (confusion.sum(axis=0) + confusion.sum(axis=1) > 0).sum() < 2:
        return math.nan
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(needs("statsmodels.stats.inter_rater", "agreement").cohens_kappa(confusion, return_results=False))


def shared_units(data: Table) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return for every two annotators who share units (S,) those units, and the label of each of the two."""
    labels = np.full((len(data.annotators), len(data.units)), -1, dtype=np.int32)
    labels[data.annotator, data.unit] = data.value
    found = {}
    for one, other in itertools.combinations(range(len(data.annotators)), 2):
        units = np.flatnonzero((labels[one] >= 0) & (labels[other] >= 0))
        if len(units):
            found[data.annotators[one], data.annotators[other]] = units, labels[one, units], labels[other, units]
    return found


def kappas(data: Table, notes: list[str]) -> dict[tuple[str, str], tuple[float, int]]:
    """Return Cohen's kappa of every two annotators who share enough units, and how many those are."""
    found, few = {}, 0
    for pair, (units, first, second) in shared_units(data).items():
        if len(units) >= FEWEST_SHARED:
            found[pair] = kappa(confusion(first, second, len(data.categories))), len(units)
        else:
            few += 1
    if few:
        notes.append(f"Cohen's kappa leaves out {few} pairs of annotators who share fewer than {FEWEST_SHARED} units")
    return found


def confusion(first: np.ndarray, second: np.ndarray, size: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Return (C, C) how often the first annotator gave one label and the second another."""
    return np.bincount(first * size + second, weights, minlength=size * size).reshape(size, size)


def mean_kappa(data: Table, pairs: Sequence[tuple[str, str]]) -> Statistic:
    """Return the mean of Cohen's kappa over pairs of annotators (Light 1971), as a function of the units drawn."""
    shared = shared_units(data)
    each = [shared[pair] for pair in pairs]
    size = len(data.categories)

    def statistic(drawn: np.ndarray) -> float:
        values = [kappa(confusion(first, second, size, drawn[units])) for units, first, second in each]
        known = [value for value in values if not math.isnan(value)]
        return float(np.mean(known)) if known else math.nan

    return statistic


def intervals(
    computed: dict[str, Statistic], cluster: np.ndarray, several: np.ndarray, bootstrap: int, seed: int,
    notes: list[str], bar: bool,
) -> dict[str, Interval]:  # fmt: skip
    """Return each figure with its 95% interval: percentiles of the figure in resamples of the items.

    Args:
        cluster: (U,) the item of each unit; the units of an item are drawn together.
        several: (U,) units with several labels; only their items are drawn.
    """
    whole = several.astype(np.int64)
    points = {name: statistic(whole) for name, statistic in computed.items()}
    items = np.unique(cluster[several])
    drawn: dict[str, list[float]] = {name: [] for name in computed}
    if len(items) < FEWEST_ITEMS:
        notes.append(f"no intervals: {len(items)} items were labeled by several annotators, {FEWEST_ITEMS} are needed")
        bootstrap = 0
    rng, often = np.random.default_rng(seed), np.zeros(cluster.max() + 1, dtype=np.int64)
    for _ in track(range(bootstrap), "  resampling items", transient=True, disable=not bar):
        often[items] = rng.multinomial(len(items), np.full(len(items), 1 / len(items)))
        for name, statistic in computed.items():
            drawn[name].append(statistic(often[cluster] * several))
    found: dict[str, Interval] = {}
    for name, point in points.items():
        known = [value for value in drawn[name] if not math.isnan(value)]
        if math.isnan(point):
            notes.append(f"{name} is not defined: all labels are the same")
        elif bootstrap and len(known) < 0.95 * bootstrap:
            notes.append(f"{name} has no interval: it is not defined in {bootstrap - len(known)} resamples")
            known = []
        low, high = np.percentile(known, [2.5, 97.5]).tolist() if known else (math.nan, math.nan)
        found[name] = (point, low, high)
    return found
