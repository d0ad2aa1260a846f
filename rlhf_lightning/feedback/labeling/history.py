"""What the history of a store adds up to: labels that hold, what was skipped, conversations as they stand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from rlhf_lightning.feedback.labeling.store import Event

UNDOABLE = ("label", "skip", "turn", "new")


@dataclass
class Annotator:
    """What one annotator has done so far.

    `labels` and `skips` have the event that holds for an item; `conversations` the turns of each, the last one going
    on; `steps` what can be undone, the last first to go; `sent` is the number of messages, those undone included.
    """

    labels: dict[str, Event] = field(default_factory=dict)
    skips: dict[str, Event] = field(default_factory=dict)
    flags: list[Event] = field(default_factory=list)
    conversations: list[list[Event]] = field(default_factory=lambda: [[]])
    steps: list[Event] = field(default_factory=list)
    sent: int = 0
    group: str | None = None
    asked: bool = False
    withdrawn: str | None = None  # when

    @property
    def done(self) -> set[str]:
        """The items that need no more of this annotator."""
        return self.labels.keys() | self.skips.keys()


class History:
    """The events of a store, added up; one that is added later goes to :meth:`apply`."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.annotators: defaultdict[str, Annotator] = defaultdict(Annotator)
        self.labeled_by: defaultdict[str, set[str]] = defaultdict(set)
        self.refused: list[Event] = []
        for event in events:
            self.apply(event)

    def apply(self, event: Event) -> None:
        """Add an event."""
        one = self.annotators[event.annotator]
        if event.kind in UNDOABLE:
            one.steps.append(event)
        match event.kind:
            case "label":
                one.labels[str(event.item)] = event
                self.labeled_by[str(event.item)].add(event.annotator)
            case "skip":
                one.skips[str(event.item)] = event
            case "turn":
                one.conversations[-1].append(event)
                one.sent += 1
            case "new":
                one.conversations.append([])
            case "flag":
                one.flags.append(event)
            case "group":
                one.group, one.asked = event.value["group"], True
            case "withdraw":
                self._withdraw(event)
            case "refused":
                self.refused.append(event)
            case "undo":
                self._undo(event)
            case _:
                raise ValueError(f"event {event.number} is of an unknown kind {event.kind!r}")

    def _undo(self, event: Event) -> None:
        one = self.annotators[event.annotator]
        undone = one.steps.pop()
        if undone.number != event.value["undone"]:
            raise ValueError(f"event {event.number} undoes {event.value['undone']}, not the last step {undone.number}")
        if undone.kind == "label":
            del one.labels[str(undone.item)]
            self.labeled_by[str(undone.item)].discard(event.annotator)
        elif undone.kind == "skip":
            del one.skips[str(undone.item)]
        elif undone.kind == "turn":
            one.conversations[-1].pop()
        else:
            one.conversations.pop()

    def _withdraw(self, event: Event) -> None:
        one = self.annotators[event.annotator]
        for item in one.labels:
            self.labeled_by[item].discard(event.annotator)
        self.annotators[event.annotator] = Annotator(withdrawn=event.time)
