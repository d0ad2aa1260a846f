"""What the labels of an annotator or a group show: agreement with the others, position and length preference, speed."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import median

from rlhf_lightning.data.comparisons import LabeledComparison
from rlhf_lightning.feedback.units import Entry
from rlhf_lightning.ops.statistics import Interval, mean_interval, share_interval


@dataclass(frozen=True)
class Profile:
    """What the labels of an annotator or a group show. Shares are None where no label tells.

    Args:
        labels: their number.
        agreement: share that is what most of the others say, of units where those have one majority.
        earlier: share of decided pairs in which the response that was shown earlier is called better; 0.5 is no
            preference of position, since which one was shown earlier is random.
        longer: share of decided pairs in which the longer response is called better.
        ties: share of pairs called a tie.
        seconds: median time per label.
        checks: share of check questions whose known best response alone is ranked best.
    """

    labels: int
    agreement: Interval | None
    earlier: Interval | None
    longer: Interval | None
    ties: Interval | None
    seconds: float | None
    checks: Interval | None


def profiles(listed: Sequence[Entry], key: Callable[[Entry], str | None]) -> dict[str, Profile]:
    """Return the profile of everyone that `key` names, in the order of their names; entries without a name in none."""
    counts: dict[Hashable, Counter[Hashable]] = {}
    for entry in listed:
        counts.setdefault(entry.unit, Counter())[entry.value] += 1
    members: dict[str, list[Entry]] = {}
    for entry in listed:
        if (name := key(entry)) is not None:
            members.setdefault(name, []).append(entry)
    return {name: profile(members[name], counts) for name in sorted(members)}


def profile(own: Sequence[Entry], counts: dict[Hashable, Counter[Hashable]]) -> Profile:
    """Return the profile of entries, given how often each value was given to each unit."""
    agrees, earlier, longer, ties = Shares(), Shares(), Shares(), Shares()
    for entry in own:
        others = counts[entry.unit] - Counter([entry.value])
        top = others.most_common(2)
        if top and (len(top) == 1 or top[0][1] > top[1][1]):
            agrees.add(entry.value == top[0][0], entry.unit[0])
        if not isinstance(entry.label, LabeledComparison):
            continue
        ties.add(entry.value == 0, entry.unit[0])
        if entry.value:
            _, i, j = entry.unit
            better, worse = (i, j) if entry.value < 0 else (j, i)
            if (shown := entry.label.shown) is not None:
                earlier.add(shown.index(better) < shown.index(worse), entry.unit[0])
            texts = entry.label.comparison.responses
            if len(texts[better]) != len(texts[worse]):
                longer.add(len(texts[better]) > len(texts[worse]), entry.unit[0])
    labels = list({id(entry.label): entry.label for entry in own}.values())
    checks = Shares()
    for label in labels:
        if isinstance(label, LabeledComparison) and label.check is not None:
            passed = label.ranking[label.check] == 0 and label.ranking.count(0) == 1
            checks.add(passed, label.comparison.id)
    timed = [label.seconds for label in labels if label.seconds is not None]
    return Profile(
        len(labels), agrees.interval(), earlier.interval(), longer.interval(), ties.interval(),
        median(timed) if timed else None, checks.interval(),
    )  # fmt: skip


class Shares:
    """Yes and no values and the items they belong to."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.items: list[Hashable] = []

    def add(self, value: bool, item: Hashable) -> None:
        self.values.append(float(value))
        self.items.append(item)

    def interval(self) -> Interval | None:
        """Return the share with its Wilson interval, clustered by item; None without values."""
        return share_interval(self.values, self.items) if self.values else None


def between_groups(listed: Sequence[Entry]) -> dict[tuple[str, str], Interval]:
    """Return for every two groups the share of pairs of labels of the same unit that agree, one of each group.

    Of a group with itself it is the share within the group. Every unit counts once; units of an item are a cluster.
    """
    units: dict[Hashable, list[Entry]] = {}
    for entry in listed:
        if entry.group is not None:
            units.setdefault(entry.unit, []).append(entry)
    shares: dict[tuple[str, str], list[tuple[float, Hashable]]] = {}
    for members in units.values():
        agrees: dict[tuple[str, str], list[bool]] = {}
        for one, other in itertools.combinations(members, 2):
            first, second = sorted((str(one.group), str(other.group)))
            agrees.setdefault((first, second), []).append(one.value == other.value)
        for pair, values in agrees.items():
            shares.setdefault(pair, []).append((sum(values) / len(values), members[0].unit[0]))
    return {
        pair: mean_interval([value for value, _ in given], [item for _, item in given])
        if len(given) > 1
        else (given[0][0], math.nan, math.nan)
        for pair, given in sorted(shares.items())
    }
