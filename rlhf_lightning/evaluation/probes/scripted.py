"""A subject whose answers are a function: planted faults, and tests of a probe of your own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.data.messages import Message
from rlhf_lightning.evaluation.probes.probe import Prompt, Subject
from rlhf_lightning.generation.answers import Answers

Say = Callable[[Sequence[Message], random.Random], str]
Cost = Callable[[Prompt, str, random.Random], Sequence[float]]


class Scripted(Subject):
    """A subject without a model.

    Args:
        say: returns a response to a conversation; the generator depends on the seed, the key, the place of the
            conversation and the number of the response.
        cost: returns -log p of each token of a response; None is 2 nats for every word.
        options: of :class:`Subject`.
    """

    def __init__(self, say: Say, cost: Cost | None = None, **options: Any) -> None:
        super().__init__(None, None, None, **options)  # type: ignore[arg-type]
        self.say, self.cost = say, cost

    def answers(
        self, conversations: Sequence[Prompt], key: str, *, num_generations: int = 1, prefixes: Any = None, **_: Any
    ) -> Answers:
        """Return what `say` returns, after the prefix of each conversation; a word is a token."""
        texts = []
        for place, conversation in enumerate(conversations):
            turns = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
            begin = str(prefixes[place]) if prefixes else ""
            for number in range(num_generations):
                texts.append(begin + self.say(turns, random.Random(f"{self.seed}:{key}:{place}:{number}")))
        prompts = [str(c if isinstance(c, str) else c[-1]["content"]) for c in conversations]
        repeated = [prompt for prompt in prompts for _ in range(num_generations)]
        return Answers(
            num_generations, repeated, [{} for _ in texts], [[0] * len(text.split()) for text in texts], texts,
            [True] * len(texts), {},
        )  # fmt: skip

    def logprobs(self, conversations: Sequence[Prompt], responses: Sequence[Any], of: str = "model") -> list[Tensor]:
        """Return what `cost` says of each response."""
        if of == "reference" and self.reference is not None:
            return self.reference.logprobs(conversations, responses)
        found = []
        for place, (conversation, response) in enumerate(zip(conversations, responses, strict=True)):
            text = response if isinstance(response, str) else " ".join(map(str, response))
            rng = random.Random(f"{self.seed}:cost:{place}")
            costs = [2.0] * len(text.split()) if self.cost is None else list(self.cost(conversation, text, rng))
            found.append(-torch.tensor(costs))
        return found
