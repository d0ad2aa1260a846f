"""The protocol of generation engines, which PPO, candidates, evaluate, samples and audit use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn


@dataclass(frozen=True)
class Generations:
    """Responses of P prompts with n generations each, prompt by prompt: token ids, and whether each ended with EOS."""

    responses: list[list[int]]
    finished: list[bool]


class Engine(Protocol):
    """Generates responses from the weights it was started with.

    :class:`rlhf_lightning.generation.local.LocalEngine` is the one in this process; a configuration names another one
    with `sampler._target_`.
    """

    def start(self, lm: nn.Module, eos_ids: Iterable[int]) -> None:
        """Take the language model to generate from and the tokens that end a response."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int = 1,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed_parts: Sequence[int | str] = (0,),
        ids: Sequence[int] | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> Generations:
        """Return `num_generations` responses to each prompt from the weights as they are now.

        Args:
            prompts: P lists of token ids.
            max_new_tokens: longest response.
            temperature: divides the logits; 0 takes the most likely token.
            seed_parts: with `ids` (default: the prompt's place) decides every sampled token.
            progress: called with the number of prompts done after each batch.
        """
        ...

    def close(self) -> None:
        """Free what `start` took."""


def truncation(engine: Any) -> str | None:
    """Return the option by which an engine samples from a part of the distribution, such as "top_p=0.9", or None."""
    whole = {"top_k": (0, None), "top_p": (1, None)}
    given = {name: getattr(engine, name, None) for name in whole}
    return next((f"{name}={value}" for name, value in given.items() if value not in whole[name]), None)
