"""Labels as files: labeled comparisons, preferences, rankings, demonstrations, and a data card."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rlhf_lightning.data.comparisons import LabeledComparison
from rlhf_lightning.data.messages import turn
from rlhf_lightning.feedback import card
from rlhf_lightning.feedback.labeling.history import Annotator, History
from rlhf_lightning.feedback.labeling.items import Item
from rlhf_lightning.feedback.labeling.overview import agreement, pairs_of
from rlhf_lightning.feedback.labeling.store import Event, Store
from rlhf_lightning.files import atomic_path, write_jsonl

Row = dict[str, Any]


@dataclass
class StoredLabels:
    """What holds of a store: withdrawn and undone labels are not in it.

    `comparisons` are in the order of their time; `demonstrations` are rows; `notes` are skips and flags.
    """

    comparisons: list[LabeledComparison] = field(default_factory=list)
    demonstrations: list[Row] = field(default_factory=list)
    notes: list[Row] = field(default_factory=list)


def stored_labels(store: Store, history: History | None = None) -> StoredLabels:
    """Return the labels of a store."""
    history = history or History(store.events)
    items, labels = {key: Item.read(value) for key, value in store.items.items()}, StoredLabels()
    for event, one in sorted(_holding(history, "labels"), key=lambda pair: pair[0].number):
        item = items[str(event.item)]
        if "ranking" in event.value:
            labels.comparisons.append(_labeled(event, one, item))
        else:
            labels.demonstrations.append(_demonstration(event, one, item))
    for kind in ("skips", "flags"):
        for event, _ in sorted(_holding(history, kind), key=lambda pair: pair[0].number):
            note = {"id": items[str(event.item)].comparison.id, "annotator": event.annotator, "kind": event.kind}
            labels.notes.append(note | {"reason": event.value["reason"], "time": event.time})
    return labels


def _holding(history: History, kind: str) -> Iterator[tuple[Event, Annotator]]:
    for one in history.annotators.values():
        events = getattr(one, kind)
        yield from ((event, one) for event in (events.values() if isinstance(events, dict) else events))


def _labeled(event: Event, one: Annotator, item: Item) -> LabeledComparison:
    value = event.value
    return LabeledComparison(
        item.comparison,
        tuple(value["ranking"]),
        event.annotator,
        group=one.group,
        strength=value.get("strength"),
        shown=tuple(value["shown"]),
        seconds=value.get("seconds"),
        time=event.time,
        check=item.check,
    )


def _demonstration(event: Event, one: Annotator, item: Item) -> Row:
    comparison = item.comparison
    row = {**comparison.metadata, "id": comparison.id}
    row["messages"] = [*comparison.prompt, turn("assistant", event.value["text"])]
    if comparison.responses:
        row["original"] = comparison.responses[0]
    return row | _about(event.annotator, one.group, event.time, seconds=event.value.get("seconds"))


def _about(annotator: str, group: str | None, time: str | None, **more: Any) -> Row:
    known = {"group": group, "time": time} | more
    return {"annotator": annotator, **{name: value for name, value in known.items() if value is not None}}


def preference_rows(labels: StoredLabels) -> list[Row]:
    """Return a row for every two answers of which a comparison prefers one; check questions are left out."""
    rows = []
    for one in labels.comparisons:
        if one.check is not None:
            continue
        texts, ranks = one.comparison.responses, one.ranking
        for i, j in itertools.permutations(range(len(texts)), 2):
            if ranks[i] < ranks[j] and texts[i].strip() != texts[j].strip():
                row = {"id": one.comparison.id, "prompt": one.comparison.prompt}
                row |= {"chosen": texts[i], "rejected": texts[j]}
                rows.append(row | _about(one.annotator, one.group, one.time, strength=one.strength))
    return rows


def ranking_rows(labels: StoredLabels) -> list[Row]:
    """Return a row for every ranking that prefers something; check questions are left out."""
    rows = []
    for one in labels.comparisons:
        if one.check is None and len(set(one.ranking)) > 1:
            row = {"id": one.comparison.id, "prompt": one.comparison.prompt}
            row |= {"responses": list(one.comparison.responses), "ranking": list(one.ranking)}
            rows.append(row | _about(one.annotator, one.group, one.time))
    return rows


WRITES: dict[str, tuple[tuple[str, Callable[[StoredLabels], list[Row]]], ...]] = {
    "compare": (("labels", lambda it: [one.row() for one in it.comparisons]), ("preferences", preference_rows)),
    "chat": (("labels", lambda it: [one.row() for one in it.comparisons]), ("preferences", preference_rows)),
    "rank": (("labels", lambda it: [one.row() for one in it.comparisons]), ("rankings", ranking_rows)),
    "edit": (("demonstrations", lambda it: it.demonstrations),),
    "write": (("demonstrations", lambda it: it.demonstrations),),
}
"""Mode -> the files that are written, and their rows."""


def export(store: Store, folder: str | Path, instructions: str = "") -> dict[str, int]:
    """Write what holds of a store into `folder` and return the number of rows by file.

    Each file is replaced whole or not at all: labels.jsonl and preferences.jsonl, rankings.jsonl or
    demonstrations.jsonl, by the store's mode; notes.jsonl, the skips and flags; and card.md.
    """
    folder, history = Path(folder), History(store.events)
    labels = stored_labels(store, history)
    written = {}
    for name, rows_of in (*WRITES[store.settings["mode"]], ("notes", lambda it: it.notes)):
        rows = rows_of(labels)
        write_jsonl(folder / f"{name}.jsonl", rows)
        written[f"{name}.jsonl"] = len(rows)
    with atomic_path(folder / "card.md") as temporary:
        temporary.write_text(data_card(store, history, labels, written, instructions), encoding="utf-8")
    return written


def data_card(store: Store, history: History, labels: StoredLabels, written: dict[str, int], instructions: str) -> str:
    """Return the data card: what was asked of whom, and how it went, in Markdown."""
    withdrawn = sum(one.withdrawn is not None for one in history.annotators.values())
    people = {name: one for name, one in history.annotators.items() if one.labels}
    events = [event for one in people.values() for event in one.labels.values()]
    times = sorted(event.time for event in events)
    taken = [event.value["seconds"] for event in events if event.value.get("seconds") is not None]
    pairs = pairs_of(events)
    agreed = agreement(pairs)
    groups = Counter(one.group or "not said" for one in people.values())
    facts = [
        ("Mode", store.settings["mode"]),
        ("Seed of the order of items and answers", store.settings.get("seed", 0)),
        ("Items in the store", len(store.items)),
        ("Labels", len(events)),
        ("Annotators", len(people)),
        ("Annotators who withdrew their labels, which are not in these files", withdrawn),
        ("First and last label", f"{times[0]} to {times[-1]}" if times else "none"),
        ("Median seconds per label", f"{median(taken):.1f}" if taken else "unknown"),
        (
            "Percent agreement",
            f"{100 * agreed:.1f} ({len(pairs)} pairs of labels)" if agreed is not None else "unknown",
        ),
        ("Skipped, flagged", ", ".join(str(sum(n["kind"] == kind for n in labels.notes)) for kind in ("skip", "flag"))),
    ]
    if labels.comparisons:
        facts += _positions(labels)
    rows = []
    for name, one in people.items():
        asked = [c for c in labels.comparisons if c.annotator == name and c.check is not None]
        passed = sum(c.ranking[c.check or 0] == 0 and c.ranking.count(0) == 1 for c in asked)
        rows.append([name, one.group or "", len(one.labels), f"{passed} of {len(asked)}"])
    said = card.bullets(groups.most_common()) or ["* nobody"]
    sections = {
        "Files": card.bullets((name, f"{count} rows") for name, count in written.items()),
        "Annotators": card.table(["annotator", "group", "labels", "check questions passed"], rows),
        "Groups, as annotators said of themselves": said,
    }
    if instructions.strip():
        sections["Instructions"] = card.fenced(instructions, "markdown")
    return card.data_card(facts, sections)


def _positions(labels: StoredLabels) -> list[tuple[str, str]]:
    """Return how often there was a tie, and how often what was shown first was best."""
    best = [one.ranking[one.shown[0]] == 0 for one in labels.comparisons if one.shown and len(set(one.ranking)) > 1]
    ties = sum(len(set(one.ranking)) == 1 for one in labels.comparisons)
    share = f"{sum(best)} of {len(best)}" if best else "unknown"
    return [("All answers tied", f"{ties} of {len(labels.comparisons)}"), ("The answer shown first was best", share)]
