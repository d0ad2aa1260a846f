"""What the labeling page does, without HTTP: the next task, labels, skips, flags, undo, withdrawal, conversations."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_lightning.errors import UserError, check_number, nearest
from rlhf_lightning.feedback.labeling.conversations import Conversations
from rlhf_lightning.feedback.labeling.history import Annotator, History
from rlhf_lightning.feedback.labeling.items import MODES, Item
from rlhf_lightning.feedback.labeling.refused import Refused
from rlhf_lightning.feedback.labeling.store import Event, Store
from rlhf_lightning.feedback.labeling.tasks import Tasks
from rlhf_lightning.generation.chat import Chat

SCALES = (4, 7)
LONGEST_TEXT = 200_000
"""Characters of a text that an annotator writes."""
Answer = dict[str, Any]


@dataclass(frozen=True)
class PageSettings:
    """What the page shows beside the items.

    Args:
        mode: compare, rank, edit, write or chat.
        scale: of comparisons: 4 words, or 7 points; both are recorded as a strength of 0 to 3.
        instructions: Markdown.
        groups: of which an annotator may name one.
        break_minutes: of work after which the page reminds of a break; 0 is never.
    """

    mode: str = "compare"
    scale: int = 4
    instructions: str = ""
    groups: Sequence[str] = ()
    break_minutes: float = 30

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"label.mode={self.mode} is not one of {', '.join(MODES)}.{nearest(self.mode, MODES)}")
        if self.scale not in SCALES:
            raise UserError(f"label.scale={self.scale} is not 4 or 7")
        check_number("label.break_minutes", self.break_minutes, "[0, inf)")


class Labeling:
    """Annotators at work on the items of a store.

    Every change is in the store, and on disk, before a method returns. Methods may be called from several threads;
    `mutex` keeps the history still while it is read.

    Args:
        store: its settings have the seed.
        items: by key, as :func:`read_items` returns them; they are added to the store.
        annotators: names.
        page: what the page shows.
        checks: check questions, by key.
        chat: answers of a model, for mode chat.
        num_generations: answers at every turn of a conversation.
        tasks: further arguments of :class:`Tasks`.
    """

    def __init__(
        self,
        store: Store,
        items: Mapping[str, Item],
        annotators: Sequence[str],
        page: PageSettings | None = None,
        *,
        checks: Mapping[str, Item] | None = None,
        chat: Chat | None = None,
        num_generations: int = 2,
        **tasks: Any,
    ) -> None:
        self.store, self.page, self.annotators = store, page or PageSettings(), list(annotators)
        self.seed = int(store.settings.get("seed", 0))
        self.history = History(store.events)
        self.tasks = Tasks(items, annotators, self.history, checks=checks, seed=self.seed, **tasks)
        store.add_items({key: item.value() for key, item in (dict(items) | dict(checks or {})).items()})
        self.mutex = threading.RLock()
        self.conversations = None
        if self.page.mode == "chat":
            if chat is None:
                raise UserError("label.mode=chat needs a model: init_from=<model>, or label.base_url and label.model")
            self.conversations = Conversations(store, list(items.values()), chat, num_generations, self.seed)

    def close(self) -> None:
        """End the answers that a model is giving; the store stays open."""
        if self.conversations is not None:
            self.conversations.chat.close()

    # ---- reading ---------------------------------------------------------------------------------------------------

    def start(self, annotator: str) -> Answer:
        """Return what the page needs once, and the first task."""
        page = self.page
        return {
            "annotator": annotator, "mode": page.mode, "scale": page.scale, "instructions": page.instructions,
            "groups": list(page.groups), "break_minutes": page.break_minutes,
        } | self.state(annotator)  # fmt: skip

    def state(self, annotator: str) -> Answer:
        """Return the annotator's task, progress, and what can be undone."""
        with self.mutex:
            one = self.history.annotators[annotator]
            answer: Answer = {
                "withdrawn": one.withdrawn,
                "ask_group": bool(self.page.groups) and not one.asked,
                "done": len(one.labels),
                "undo": one.steps[-1].kind if one.steps else None,
            }
            if one.withdrawn:
                return answer | {"task": None, "left": 0}
            if self.conversations is not None:
                return answer | {"task": self.conversations.task(annotator, one), "left": None}
            left = self.tasks.left(annotator)
            item = self.tasks.next(annotator)
            if item is not None and item.key in self.tasks.checks:  # as if it were one of the others
                left += 1
            return answer | {"task": item and self.shown(item, annotator), "left": left}

    def shown(self, item: Item, annotator: str) -> Answer:
        """Return an item as the page shows it: no names of models, no other columns, answers in the recorded order."""
        order = item.shown(self.seed, annotator)
        flagged = any(flag.item == item.key for flag in self.history.annotators[annotator].flags)
        return {
            "item": item.key, "prompt": item.comparison.prompt, "warning": item.warning, "flagged": flagged,
            "responses": [item.comparison.responses[place] for place in order],
        }  # fmt: skip

    # ---- changes ---------------------------------------------------------------------------------------------------

    def label(self, annotator: str, key: str, request: str, given: Mapping[str, Any]) -> None:
        """Record what an annotator says of an item.

        Args:
            request: a name that the page makes up; a repeated request adds nothing.
            given: `seconds`, and by mode `value` of -3 (the first shown is much better) to 3 (the second), `ranks` of
                the answers as they are shown, `text`, or `pick` and `strength` in a conversation.

        Raises:
            Refused: the item is gone or has a label already, or the values are none of these.
        """
        with self.mutex:
            if self._repeated(annotator, request):
                return
            one, item = self._working(annotator), self._item(annotator, key, request)
            if key in one.labels:
                raise Refused("labeled", "This one has your label already. Undo goes back to it.")
            seconds = self._seconds(given.get("seconds"))
            if self.conversations is not None:
                value = self.conversations.picked(one, item, key, given)
            else:
                value = self._labeled(annotator, item, given)
            self._add("label", annotator, key, request, seconds=seconds, **value)

    def skip(self, annotator: str, key: str, request: str, reason: str) -> None:
        """Record that an annotator leaves out an item, and why."""
        self._noted("skip", annotator, key, request, reason)

    def flag(self, annotator: str, key: str, request: str, reason: str) -> None:
        """Record a problem of an item; it may be labeled all the same."""
        self._noted("flag", annotator, key, request, reason)

    def undo(self, annotator: str, request: str) -> Answer:
        """Take back the annotator's last label, skip or turn, and go back to its item; return what it was."""
        with self.mutex:
            one = self.history.annotators[annotator]
            if (event := self._repeated(annotator, request)) is not None:
                return event.value["given"]
            self._working(annotator)
            if not one.steps:
                raise Refused("nothing", "There is nothing to undo.")
            last = one.steps[-1]
            given = {"kind": last.kind} | {
                name: value for name, value in last.value.items() if name in ("value", "ranks", "text", "pick", "say")
            }
            self._add("undo", annotator, last.item, request, undone=last.number, given=given)
            if last.item and last.kind in ("label", "skip"):
                self.tasks.hold(annotator, last.item)
            return given

    def group(self, annotator: str, request: str, group: str | None) -> None:
        """Record the group that an annotator names, None for none."""
        with self.mutex:
            if group is not None and group not in self.page.groups:
                raise Refused("values", "That group is not one of those that were offered.")
            if not self._repeated(annotator, request):
                self._working(annotator)
                self._add("group", annotator, None, request, group=group)

    def withdraw(self, annotator: str, request: str | None = None, by: str = "the annotator") -> None:
        """Withdraw everything that an annotator did, see :func:`withdraw`."""
        with self.mutex:
            if not self._repeated(annotator, request):
                withdraw(self.store, annotator, by, self.history, request, self.annotators)

    def say(self, annotator: str, request: str, text: str) -> None:
        """Send a message to the model and record its answers; nothing is recorded when it cannot answer."""
        conversations = self._conversations()
        with self.mutex:
            if self._repeated(annotator, request):
                return
            messages, parts = conversations.asked(self._working(annotator), annotator, self._text(text))
        answers = conversations.answers(messages, parts)  # takes its time; others go on
        with self.mutex:
            if self._repeated(annotator, request):
                return
            key, order = conversations.keep(self._working(annotator), annotator, messages, answers)
            self._add("turn", annotator, key, request, say=text, shown=order)

    def new_conversation(self, annotator: str, request: str) -> None:
        """Leave the conversation as it is and begin another one."""
        self._conversations()
        with self.mutex:
            if not self._repeated(annotator, request):
                self._working(annotator)
                self._add("new", annotator, None, request)

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _add(self, kind: str, annotator: str, item: str | None, request: str | None, **value: Any) -> None:
        event, new = self.store.add(kind, annotator, item, request, **value)
        if new:
            self.history.apply(event)

    def _repeated(self, annotator: str, request: str | None) -> Event | None:
        """Return the event of a request that came before, of the same annotator."""
        event = self.store.request(request)
        if event is not None and event.annotator != annotator:
            raise Refused("values", "This request belongs to somebody else.")
        return event

    def _working(self, annotator: str) -> Annotator:
        one = self.history.annotators[annotator]
        if one.withdrawn:
            raise Refused("withdrawn", "You have withdrawn your labels. Nothing more is recorded.")
        return one

    def _item(self, annotator: str, key: str, request: str) -> Item:
        """Return an item of this start or of the store; a label for another one is recorded as refused."""
        if item := self.tasks.items.get(key) or self.tasks.checks.get(key):
            return item
        if key in self.store.items:
            return Item.read(self.store.items[key])
        self._add("refused", annotator, None, request, key=key[:100], reason="no such item")
        raise Refused("gone", "This one is not in the data any more, so it cannot be labeled. Here is the next.")

    def _noted(self, kind: str, annotator: str, key: str, request: str, reason: str) -> None:
        with self.mutex:
            if self._repeated(annotator, request):
                return
            one = self._working(annotator)
            self._item(annotator, key, request)
            if kind == "skip" and key in one.done:
                raise Refused("labeled", "This one is done already. Undo goes back to it.")
            self._add(kind, annotator, key, request, reason=self._text(reason)[:2000])

    def _labeled(self, annotator: str, item: Item, given: Mapping[str, Any]) -> Answer:
        """Return what is recorded of a label: for the answers in the order of the row, and as it was given."""
        order = item.shown(self.seed, annotator)
        if self.page.mode == "compare":
            value = given.get("value")
            if not isinstance(value, int) or isinstance(value, bool) or abs(value) > 3 or len(order) != 2:
                raise Refused("values", "The value of a comparison is a whole number from -3 to 3.")
            ranks = [int(value > 0), int(value < 0)]
            return {"ranking": inverse(ranks, order), "strength": abs(value), "shown": order, "value": value}
        if self.page.mode == "rank":
            ranks = given.get("ranks")
            if not isinstance(ranks, list) or not is_ranking(ranks, len(order)):
                raise Refused("values", "A ranking has a rank for every answer, from 0 without gaps.")
            return {"ranking": inverse(ranks, order), "shown": order, "ranks": ranks}
        text = self._text(given.get("text"))
        if not text.strip():
            raise Refused("values", "The answer is empty.")
        return {"text": text}

    def _conversations(self) -> Conversations:
        if self.conversations is None:
            raise Refused("values", "There is no model to talk to.")
        return self.conversations

    @staticmethod
    def _text(text: Any) -> str:
        if not isinstance(text, str) or len(text) > LONGEST_TEXT:
            raise Refused("values", f"A text of at most {LONGEST_TEXT} characters is needed.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Refused("values", "The text contains half a character (a lone surrogate).") from None
        return text

    @staticmethod
    def _seconds(value: Any) -> float | None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
            return None
        return round(float(value), 1)


def withdraw(
    store: Store,
    annotator: str,
    by: str,
    history: History | None = None,
    request: str | None = None,
    names: Sequence[str] = (),
) -> None:
    """Withdraw everything that an annotator did, from all exports, and end their work.

    Args:
        by: who did that, for the record.
        history: of the store, which follows.
        names: annotators who may have done nothing yet.

    Raises:
        UserError: nobody of that name.
    """
    history = history or History(store.events)
    if annotator not in history.annotators and annotator not in names:
        known = sorted({*names, *history.annotators})
        hint = nearest(annotator, known) or f" There are {', '.join(known) or 'none'}."
        raise UserError(f"there is no annotator {annotator!r} in {store.path}.{hint}")
    if not history.annotators[annotator].withdrawn:
        history.apply(store.add("withdraw", annotator, None, request, by=by)[0])


def is_ranking(ranks: Sequence[Any], size: int) -> bool:
    """Return whether there are `size` ranks, from 0 without gaps."""
    whole = all(type(rank) is int for rank in ranks)
    return whole and len(ranks) == size and sorted(set(ranks)) == list(range(len(set(ranks))))


def inverse(ranks: Sequence[int], order: Sequence[int]) -> list[int]:
    """Return the rank of every answer in the order of the row, from the ranks in the order shown."""
    result = [0] * len(ranks)
    for place, rank in zip(order, ranks, strict=True):
        result[place] = rank
    return result
