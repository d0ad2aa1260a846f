"""Labels as a table of units by annotators: what agreement and reliability are computed from.

A unit is what two annotators can agree on: an item that has a label, or two responses of a comparison. A comparison of
K responses has K (K - 1) / 2 units, which belong together when their error is estimated.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_lightning.data.comparisons import LabeledComparison
from rlhf_lightning.feedback.reading import Labels


@dataclass(frozen=True)
class Entry:
    """What an annotator says of a unit.

    Args:
        unit: (id of the item,) or (id of the comparison, place of a response, place of another).
        value: of a pair -1, 0 or 1: the first is better, a tie, the second; else the label.
        strength: of a pair `value` times how much better, where that is known, else `value`; None of other labels.
        label: where it comes from.
    """

    unit: tuple[Any, ...]
    annotator: str
    group: str | None
    value: Any
    strength: int | None
    label: Any


def entries(labels: Labels) -> list[Entry]:
    """Return an entry for every pair of responses of every label, and for every label of an item."""
    listed = []
    for label in labels.comparisons:
        for i, j in itertools.combinations(range(len(label.ranking)), 2):
            value = sign(label, i, j)
            strength = value * (label.strength or 1) if len(label.ranking) == 2 else value
            listed.append(Entry((label.comparison.id, i, j), label.annotator, label.group, value, strength, label))
    return listed + [Entry((x.id,), x.annotator, x.group, x.label, None, x) for x in labels.items]


def sign(label: LabeledComparison, i: int, j: int) -> int:
    """Return -1 where the label ranks response i above response j, 1 where below, 0 for a tie."""
    return (label.ranking[i] > label.ranking[j]) - (label.ranking[i] < label.ranking[j])


@dataclass(frozen=True)
class Table:
    """Values of U units by annotators, N of them known.

    Args:
        unit, annotator, value: (N,) indices of units, annotators and categories.
        cluster: (U,) index of the item that each unit belongs to.
        units, annotators, categories: what the indices stand for; categories in order, smallest first.
    """

    unit: np.ndarray
    annotator: np.ndarray
    value: np.ndarray
    cluster: np.ndarray
    units: list[tuple[Any, ...]]
    annotators: list[str]
    categories: list[Any]

    @property
    def counts(self) -> np.ndarray:
        """(U, C) how often each category was given to each unit."""
        counts = np.zeros((len(self.units), len(self.categories)), dtype=np.int64)
        np.add.at(counts, (self.unit, self.value), 1)
        return counts


def table(of: Sequence[Entry], strength: bool = False) -> Table:
    """Return entries as a table of their values, or of their strengths."""
    unit, units = indexed([entry.unit for entry in of])
    annotator, annotators = indexed([entry.annotator for entry in of])
    values: list[Any] = [entry.strength if strength else entry.value for entry in of]
    categories = sorted(set(values))
    places = {category: place for place, category in enumerate(categories)}
    cluster, _ = indexed([key[0] for key in units])
    value = np.array([places[v] for v in values], dtype=np.int64)
    return Table(unit, annotator, value, cluster, units, annotators, categories)


def indexed(values: Sequence[Hashable]) -> tuple[np.ndarray, list[Any]]:
    """Return the index of each value in the list of different ones, and that list, in the order they come."""
    places = {value: place for place, value in enumerate(dict.fromkeys(values))}
    return np.array([places[value] for value in values], dtype=np.int64), list(places)
