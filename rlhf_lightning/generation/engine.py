"""The base class of generation engines, which PPO, candidates, evaluate, chat, samples, probes and audit use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rlhf_lightning.errors import UserError


@dataclass(frozen=True)
class Generations:
    """Responses of P prompts with n generations each, prompt by prompt: token ids, and whether each ended with EOS.

    `logprobs` are the engine's own log-probabilities of the sampled tokens, None where it gives none.
    """

    responses: list[list[int]]
    finished: list[bool]
    logprobs: list[list[float]] | None = None


class Engine(ABC):
    """Generates responses: `start`, then `sync` and `generate` in turn, `sleep` between phases, `close`.

    :class:`rlhf_lightning.generation.local.LocalEngine` is the one in this process; a configuration names another one
    with `sampler._target_`. An engine that reads the weights of the model it was started with needs no `sync`.
    """

    @abstractmethod
    def start(self, lm: nn.Module, eos_ids: Iterable[int]) -> None:
        """Take the language model to generate from and the tokens that end a response."""

    def sync(self) -> None:  # noqa: B027  a default
        """Take the weights of the model as they are now, on every rank at the same time.

        Raises:
            UserError: the engine does not have them afterwards, see :mod:`rlhf_lightning.generation.staleness`.
        """

    @abstractmethod
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
        """Return `num_generations` responses to each prompt from the weights of the last `sync`.

        Args:
            prompts: P lists of token ids.
            max_new_tokens: longest response.
            temperature: divides the logits; 0 takes the most likely token.
            seed_parts: with `ids` (default: the prompt's place) decides every sampled token.
            progress: called with the number of prompts done after each batch.
        """

    def sleep(self) -> None:  # noqa: B027  a default
        """Free memory until the next `sync`, on every rank at the same time."""

    @abstractmethod
    def close(self) -> None:
        """Free what `start` took; the engine may be started again."""


def check_engine(engine: Any) -> None:
    """Raise a UserError for what is no :class:`Engine`."""
    if not isinstance(engine, Engine):
        raise UserError(
            f"sampler: {type(engine).__name__} is no rlhf_lightning.Engine: derive it from that class, which asks for "
            "start, generate and close, and has a sync and a sleep that do nothing"
        )


def truncation(engine: Any) -> str | None:
    """Return the option by which an engine samples from a part of the distribution, such as "top_p=0.9", or None."""
    whole = {"top_k": (0, None), "top_p": (1, None)}
    given = {name: getattr(engine, name, None) for name in whole}
    return next((f"{name}={value}" for name, value in given.items() if value not in whole[name]), None)
