"""Answers to a conversation: from a model in this process, or from an OpenAI-compatible server."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, Protocol

from rlhf_lightning.data.messages import Message, RowError
from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.generation.answers import answer, start
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.generation.server import Server, answers_of
from rlhf_lightning.ops.groups import Group


class Chat(Protocol):
    """Answers a conversation."""

    def __call__(self, messages: Sequence[Message], num_generations: int, seed_parts: Sequence[int | str]) -> list[str]:
        """Return sampled answers to the last message.

        Args:
            seed_parts: decide the samples, as far as the model can be seeded.

        Raises:
            UserError: the model cannot answer this conversation, is not reachable, or was closed.
        """
        ...

    def close(self) -> None:
        """End calls that are running in other threads, as far as they can be, and answer no more."""


class LocalChat:
    """A language model in this process, sampled by an engine; calls from several threads wait for each other.

    Args:
        lm: a causal language model, on the device where it computes.
        template: encodes conversations.
        engine: samples; it is started with `lm` here.
        context: the model's context length in tokens, None where it has none.
    """

    def __init__(
        self,
        lm: Any,
        template: Template,
        engine: Engine,
        *,
        context: int | None = None,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
    ) -> None:
        self.template, self.engine, self.context = template, engine, context
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self._mutex, self._closed = threading.Lock(), threading.Event()
        lm.register_forward_pre_hook(self._check_open)  # a token more, then it ends
        start(engine, lm, template)

    def _check_open(self, *_: Any) -> None:
        if self._closed.is_set():
            raise UserError("it was closed")

    def close(self) -> None:
        """End the call that is running, and answer no more."""
        self._closed.set()
        with self._mutex:
            self.engine.close()

    def __call__(self, messages: Sequence[Message], num_generations: int, seed_parts: Sequence[int | str]) -> list[str]:
        """Return sampled answers, see :class:`Chat`."""
        try:
            ids = self.template.prompt(list(messages))
        except RowError as error:
            raise UserError(str(error)) from error
        if self.context is not None and len(ids) >= self.context:
            raise UserError(f"the conversation has {len(ids)} tokens, and the model reads at most {self.context}")
        return self._answer([Group(ids, [], index=0, text=messages[-1]["content"])], num_generations, seed_parts)

    def batch(
        self, conversations: Sequence[Sequence[Message]], ids: Sequence[int], seed_parts: Sequence[int | str]
    ) -> list[str | UserError]:
        """Return one answer to each conversation, or why there is none: the model has no room for it.

        Args:
            ids: a number for each conversation, which with `seed_parts` decides its answer.
        """
        room = math.inf if self.context is None else self.context - self.max_new_tokens
        answers: list[str | UserError] = [UserError("no room for an answer")] * len(conversations)
        prompts: dict[int, Group] = {}
        for place, messages in enumerate(conversations):
            try:
                tokens = self.template.prompt(list(messages))
            except RowError as error:
                answers[place] = UserError(str(error))
                continue
            if len(tokens) <= room:
                prompts[place] = Group(tokens, [], index=ids[place], text=messages[-1]["content"])
        texts = self._answer(list(prompts.values()), 1, seed_parts) if prompts else []
        for place, text in zip(prompts, texts, strict=True):
            answers[place] = text
        return answers

    def _answer(self, prompts: Sequence[Group], num_generations: int, seed_parts: Sequence[int | str]) -> list[str]:
        with self._mutex:
            self._check_open()
            return answer(
                self.engine,
                self.template,
                prompts,
                num_generations,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seed_parts=seed_parts,
            ).texts


class ServerChat:
    """A model behind an OpenAI-compatible server, see :class:`rlhf_lightning.generation.server.Server`.

    Args:
        base_url: up to `/v1`.
        model: its name there.
        timeout: seconds to wait for an answer.

    Raises:
        UserError: a URL that is none of http or https, or without a model.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None,
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        timeout: float = 120,
    ) -> None:
        self.server = Server(base_url, timeout=timeout, key="label")
        if not model:
            raise UserError(f"label.base_url={base_url} needs label.model=<the model's name there>")
        self.model, self.max_new_tokens, self.temperature = str(model), max_new_tokens, temperature

    def close(self) -> None:
        """Ask no more; a request that is running ends with its server's answer."""
        self.server.close()

    def __call__(self, messages: Sequence[Message], num_generations: int, seed_parts: Sequence[int | str]) -> list[str]:
        """Return sampled answers, see :class:`Chat`; a server that returns one at a time is asked again."""
        texts: list[str] = []
        while len(texts) < num_generations:
            got = answers_of(
                self.server.chat(
                    model=self.model,
                    messages=[{"role": m["role"], "content": m["content"]} for m in messages],
                    n=num_generations - len(texts),
                    temperature=self.temperature,
                    max_tokens=self.max_new_tokens,
                )
            )
            if not got:
                raise UserError(f"{self.server.url} returned no answer")
            texts += got
        return texts[:num_generations]


def check_sampling(stage: str, max_new_tokens: int, temperature: float) -> None:
    """Raise a UserError for a sampling option out of its range."""
    check_number(f"{stage}.max_new_tokens", max_new_tokens, "[1, inf)", whole=True)
    check_number(f"{stage}.temperature", temperature, "[0, inf)")
