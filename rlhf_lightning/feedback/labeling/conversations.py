"""Mode chat: conversations with a model in which every turn is a comparison of its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_lightning.data.comparisons import Comparison
from rlhf_lightning.data.messages import Message, turn
from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.feedback.labeling.history import Annotator
from rlhf_lightning.feedback.labeling.items import MOST_RANKED, Item
from rlhf_lightning.feedback.labeling.refused import Refused
from rlhf_lightning.feedback.labeling.store import Store
from rlhf_lightning.generation.chat import Chat
from rlhf_lightning.ops.seeding import permutation

Answer = dict[str, Any]


class Conversations:
    """The conversations of a store's annotators.

    Args:
        openings: prompts that conversations begin with, in an order of each annotator's; none begins without.
        chat: answers of a model.
        num_generations: answers at every turn.
    """

    def __init__(self, store: Store, openings: Sequence[Item], chat: Chat, num_generations: int, seed: int) -> None:
        check_number("label.num_generations", num_generations, f"[2, {MOST_RANKED}]", whole=True)
        self.store, self.openings, self.chat, self.seed = store, openings, chat, seed
        self.num_generations = num_generations

    def task(self, annotator: str, one: Annotator) -> Answer:
        """Return the conversation as the page shows it, and the answers among which to choose, if there are some."""
        opening, messages, pending = self._opening(annotator, one), self._messages(annotator, one), None
        if one.conversations[-1] and (last := one.conversations[-1][-1]).item not in one.labels:
            item = Item.read(self.store.items[str(last.item)])
            pending = [item.comparison.responses[place] for place in last.value["shown"]]
            messages = item.comparison.prompt
            draft = ""
        else:
            first = not one.conversations[-1] and opening is not None
            draft = opening.comparison.prompt[-1]["content"] if first and opening else ""
        key = one.conversations[-1][-1].item if pending else None
        return {
            "item": key, "prompt": messages, "responses": pending or [], "draft": draft,
            "warning": opening.warning if opening and not one.conversations[-1] else None,
            "flagged": bool(key) and any(flag.item == key for flag in one.flags),
            "turns": len(one.conversations[-1]),
        }  # fmt: skip

    def asked(self, one: Annotator, annotator: str, text: str) -> tuple[list[Message], list[int | str]]:
        """Return the conversation with a new message, and what seeds the answers to it."""
        if not text.strip():
            raise Refused("values", "The message is empty.")
        turns = one.conversations[-1]
        if turns and turns[-1].item not in one.labels:
            raise Refused("pending", "Choose one of the answers first, or undo your message.")
        messages = [*self._messages(annotator, one), turn("user", text)]
        return messages, [self.seed, "label", annotator, one.sent]

    def answers(self, messages: list[Message], parts: Sequence[int | str]) -> list[str]:
        """Return the answers of the model.

        Raises:
            Refused: it cannot answer; the message is the annotator's to send again.
        """
        try:
            return self.chat(messages, self.num_generations, parts)
        except UserError as error:
            raise Refused("model", f"The model could not answer: {error}") from error

    def keep(
        self, one: Annotator, annotator: str, messages: list[Message], answers: list[str]
    ) -> tuple[str, list[int]]:
        """Add a turn's comparison to the store and return its key, and the order in which the answers are shown."""
        if messages[:-1] != self._messages(annotator, one):
            raise Refused("pending", "The conversation went on elsewhere; the message was not sent.")
        name = f"{annotator}/{one.sent + 1}"
        about = {"conversation": len(one.conversations), "turn": len(one.conversations[-1]) + 1}
        item = Item(Comparison(name, messages, tuple(answers), about))
        self.store.add_items({item.key: item.value()})
        return item.key, permutation(len(answers), self.seed, "shown", annotator, item.key).tolist()

    def picked(self, one: Annotator, item: Item, key: str, given: Mapping[str, Any]) -> Answer:
        """Return what is recorded of a choice: the picked answer is better than all others, or equal to them."""
        turns, pick, strength = one.conversations[-1], given.get("pick"), given.get("strength")
        if not turns or turns[-1].item != key:
            raise Refused("stale", "The conversation has gone on; this choice is not recorded.")
        if type(pick) is not int or type(strength) is not int or not 0 <= strength <= 3:
            raise Refused("values", "A choice is the number of an answer, with a strength from 0 to 3.")
        order = turns[-1].value["shown"]
        if not 0 <= pick < len(order):
            raise Refused("values", f"There are {len(order)} answers to choose from.")
        ranking = [int(strength > 0 and place != order[pick]) for place in range(len(order))]
        return {"ranking": ranking, "strength": strength, "shown": order, "pick": pick, "continues": order[pick]}

    def _opening(self, annotator: str, one: Annotator) -> Item | None:
        number = len(one.conversations) - 1
        if number >= len(self.openings):
            return None
        return self.openings[permutation(len(self.openings), self.seed, "openings", annotator).tolist()[number]]

    def _messages(self, annotator: str, one: Annotator) -> list[Message]:
        """Return the current conversation up to the last answer that was picked."""
        opening = self._opening(annotator, one)
        messages = list(opening.comparison.prompt[:-1]) if opening else []
        for event in one.conversations[-1]:
            if event.item in one.labels:
                comparison = Item.read(self.store.items[str(event.item)]).comparison
                answer = comparison.responses[one.labels[str(event.item)].value["continues"]]
                messages = [*comparison.prompt, turn("assistant", answer)]
        return messages
