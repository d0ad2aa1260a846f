"""Figures of labels so far: progress, percent agreement, seconds per item, check questions."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from rlhf_lightning.feedback.labeling.history import Annotator
from rlhf_lightning.feedback.labeling.service import Labeling
from rlhf_lightning.feedback.labeling.store import Event


def overview(labeling: Labeling) -> dict[str, Any]:
    """Return the figures of every annotator and of all together."""
    with labeling.mutex:
        return _overview(labeling)


def _overview(labeling: Labeling) -> dict[str, Any]:
    history, tasks = labeling.history, labeling.tasks
    names = list(dict.fromkeys([*labeling.annotators, *history.annotators]))
    holding = {name: history.annotators[name] for name in names}
    labels = [event for one in holding.values() for event in one.labels.values()]
    agreed = pairs_of(labels)
    rows = []
    for name, one in holding.items():
        mine = [(a, b) for a, b in agreed if name in (a.annotator, b.annotator)]
        passed, asked = checks_passed(one, {key: item.check for key, item in tasks.checks.items()})
        rows.append(
            {
                "annotator": name, "group": one.group, "labels": len(one.labels), "skips": len(one.skips),
                "flags": len(one.flags), "seconds": seconds(one.labels.values()), "agreement": agreement(mine),
                "checks_passed": passed, "checks": asked, "withdrawn": one.withdrawn,
                "last": max((event.time for event in one.labels.values()), default=None),
            }
        )  # fmt: skip
    skipped = Counter(event.value["reason"] for one in holding.values() for event in one.skips.values())
    return {
        "mode": labeling.page.mode, "items": len(tasks.items), "labels": len(labels),
        "left": None if labeling.conversations else tasks.labels_left(), "agreement": agreement(agreed),
        "pairs": len(agreed), "seconds": seconds(labels), "annotators": rows, "refused": len(history.refused),
        "skips": [{"reason": reason, "count": count} for reason, count in skipped.most_common(10)],
        "flags": [
            {"annotator": name, "item": labeling.store.items[str(flag.item)]["id"], "reason": flag.value["reason"]}
            for name, one in holding.items() for flag in one.flags
        ][-20:],
    }  # fmt: skip


def pairs_of(labels: Iterable[Event]) -> list[tuple[Event, Event]]:
    """Return every two labels of one item that rank answers."""
    by_item: defaultdict[str, list[Event]] = defaultdict(list)
    for event in labels:
        if "ranking" in event.value:
            by_item[str(event.item)].append(event)
    return [pair for events in by_item.values() for pair in itertools.combinations(events, 2)]


def agreement(pairs: Sequence[tuple[Event, Event]]) -> float | None:
    """Return the share of pairs of answers that two labels order alike, ties included; None without pairs."""
    same = total = 0
    for a, b in pairs:
        ours, theirs = a.value["ranking"], b.value["ranking"]
        for i, j in itertools.combinations(range(len(ours)), 2):
            total += 1
            same += sign(ours[i] - ours[j]) == sign(theirs[i] - theirs[j])
    return same / total if total else None


def checks_passed(one: Annotator, known: dict[str, int | None]) -> tuple[int, int]:
    """Return how many check questions an annotator answered with the known best alone, and how many in all."""
    answered = [(known[key], event.value["ranking"]) for key, event in one.labels.items() if known.get(key) is not None]
    return sum(ranking[best] == 0 and ranking.count(0) == 1 for best, ranking in answered), len(answered)


def seconds(labels: Iterable[Event]) -> float | None:
    """Return the median of the seconds that labels took."""
    known = [event.value["seconds"] for event in labels if event.value.get("seconds") is not None]
    return round(median(known), 1) if known else None


def sign(value: int) -> int:
    """Return -1, 0 or 1."""
    return (value > 0) - (value < 0)
