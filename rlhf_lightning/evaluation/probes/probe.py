"""What a probe is: prompts, the model under probe, and metrics with intervals and alarms in return."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from rlhf_lightning.data.messages import Message, RowError
from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.answers import Answers, answer, start
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.judges.judge import Judge
from rlhf_lightning.models.completion import CompletionModel, choose_layout, response_logprobs, unwrap
from rlhf_lightning.models.ends import eos_ids
from rlhf_lightning.ops.groups import Group
from rlhf_lightning.ops.statistics import Interval
from rlhf_lightning.rewards.scoring import Reward

Row = dict[str, Any]
Prompt = str | Sequence[Message]
"""A conversation, or a text without roles that is continued as it is."""
NEEDS = ("gold", "reward", "judge", "reference")


@dataclass(frozen=True)
class Result:
    """What a probe measured.

    Args:
        metrics: name -> (value, low, high), 95% intervals; the ends are NaN where there is no interval.
        samples: rows with `prompt`, `response` and what was measured of them.
        tables: name -> rows behind a figure, each with the column `model` left to the stage.
        alarms: metric -> one sentence in plain words.
        counts: metric -> the number of responses or prompts that it is of.
    """

    metrics: dict[str, Interval]
    samples: list[Row]
    tables: dict[str, list[Row]] = field(default_factory=dict)
    alarms: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """A row of the table of probes.

    Args:
        name: as in `probe=<name>`; its settings are the configuration's key `probe.<name>`, and its own
            rows `data/<name>.jsonl`.
        summary: what it measures.
        runs: `module:function` in this package, called as `(subject, rows, **settings) -> Result`.
        columns: column that every row has -> what it means.
        optional: column that a row may have -> what it means.
        check: `module:function` in this package that returns why a row is wrong, or None.
        world: `module:function` in this package that returns rows of the built-in world, called with their number and
            the seed.
        needs: of `NEEDS`, without which it measures nothing.
        uses: of `NEEDS`, with which it measures more.
        settings: option -> default.
        options: `module:function` in this package that raises a UserError for settings out of range, called with
            these and `temperature`, the subject's unless it is among them.
    """

    name: str
    summary: str
    runs: str
    columns: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)
    check: str | None = None
    world: str | None = None
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: str | None = None

    def check_options(self, temperature: float, settings: Mapping[str, Any]) -> None:
        """Raise a UserError for settings that are out of range, before any work."""
        if self.options is not None:
            _function(self.options)(**{"temperature": temperature} | dict(self.settings) | dict(settings))

    def load(self) -> Callable[..., Result]:
        """Import and return the function that runs it."""
        return _function(self.runs)

    def problem(self, row: Row) -> str | None:
        """Return why a row is wrong, None where it is not."""
        return None if self.check is None else _function(self.check)(row)

    def world_rows(self, count: int, seed: int) -> list[Row]:
        """Return rows made from the built-in world.

        Raises:
            UserError: it has none.
        """
        if self.world is None:
            raise UserError(f"probe.data=world: the world has no rows for probe={self.name}")
        return _function(self.world)(count, seed)


def _function(place: str) -> Any:
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(f"rlhf_lightning.evaluation.probes.{module}"), function)


class Subject:
    """The model under probe and what it is measured with.

    Args:
        model: a causal language model, on the device where it computes.
        template: encodes conversations.
        engine: generates; it is started for each call and closed after it.
        reference: returns the subject to compare with, such as the model before RLHF; None where there is none.
        gold, reward: score responses; None where there is none.
        judge: rates or compares responses; None where there is none.
        context: the model's context length in tokens, None where it has none.
        max_new_tokens, temperature: of answers for which a probe asks nothing else.
        seed: with the key and the place of a conversation decides its answers.
        remember: keep answers, of a reference that several models are compared with.
        progress: called with the probe's key or "log-probabilities", the answers done and their number.
    """

    def __init__(
        self,
        model: Any,
        template: Template,
        engine: Engine,
        *,
        reference: Callable[[], Subject] | None = None,
        gold: Reward | None = None,
        reward: Reward | None = None,
        judge: Judge | None = None,
        context: int | None = None,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
        device: str = "cpu",
        remember: bool = False,
        progress: Callable[[str, int, int], Any] | None = None,
    ) -> None:
        self.model, self.template, self.engine = model, template, engine
        self.gold, self.reward, self.judge = gold, reward, judge
        self.context, self.max_new_tokens, self.temperature = context, max_new_tokens, temperature
        self.seed, self.device, self.progress = seed, device, progress
        self._load_reference = reference
        self._remembered: dict[str, Answers] | None = {} if remember else None

    @cached_property
    def reference(self) -> Subject | None:
        """The subject to compare with, loaded at its first use; None where there is none."""
        return self._load_reference() if self._load_reference else None

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference, without loading it."""
        return self._load_reference is not None

    def answer(
        self,
        conversations: Sequence[Prompt],
        key: str,
        *,
        num_generations: int = 1,
        prefixes: Sequence[str | Sequence[int]] | None = None,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
    ) -> list[str]:
        """Return `num_generations` sampled responses to each conversation, as text; see :meth:`answers`."""
        return self.answers(
            conversations, key, num_generations=num_generations, prefixes=prefixes, temperature=temperature,
            max_new_tokens=max_new_tokens,
        ).texts  # fmt: skip

    def answers(
        self,
        conversations: Sequence[Prompt],
        key: str,
        *,
        num_generations: int = 1,
        prefixes: Sequence[str | Sequence[int]] | None = None,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
    ) -> Answers:
        """Return sampled responses with their tokens.

        Args:
            key: with the seed and the place of a conversation decides its answers.
            prefixes: text or tokens with which each response begins; they are a part of it.
            temperature, max_new_tokens: None is the subject's; the tokens of a prefix are not counted.

        Raises:
            UserError: a conversation that the template refuses, or for which the context is too short.
        """
        room = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        heat = self.temperature if temperature is None else temperature
        memory = repr((key, num_generations, prefixes, heat, room, conversations))
        if self._remembered is not None and memory in self._remembered:
            return self._remembered[memory]
        forced = [
            self._forced(*pair) for pair in zip(conversations, prefixes or [""] * len(conversations), strict=True)
        ]
        prompts = [self._prompt(c, place, forced[place], room) for place, c in enumerate(conversations)]
        start(self.engine, self.model, self.template)
        try:
            found = answer(
                self.engine,
                self.template,
                prompts,
                num_generations,
                max_new_tokens=room,
                temperature=heat,
                seed_parts=(self.seed, "probe", key),
                progress=self._advance(key, len(prompts)),
            )
        finally:
            self.engine.close()
        found = self._with_prefixes(found, forced) if prefixes else found
        if self._remembered is not None:
            self._remembered[memory] = found
        return found

    def _advance(self, key: str, total: int) -> Callable[[int], None]:
        """Return what is called with the number of answers after each batch."""
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if self.progress:
                self.progress(key, done, total)

        return advance

    def _forced(self, conversation: Prompt, prefix: str | Sequence[int]) -> list[int]:
        """Return the tokens of a prefix; of a text those with which a response that begins so is learned."""
        if not prefix or not isinstance(prefix, str):
            return list(prefix)  # type: ignore[arg-type]
        prompt = conversation if isinstance(conversation, str) else list(conversation)
        tokens, end = self.template.completions(prompt, [prefix])[1][0], self.template.end
        return tokens[: -len(end)] if end and tokens[-len(end) :] == end else tokens

    def _prompt(self, conversation: Prompt, place: int, prefix: Sequence[int], room: int) -> Group:
        try:
            ids = self.template.prompt(conversation if isinstance(conversation, str) else list(conversation))
        except RowError as error:
            raise UserError(f"probe: conversation {place + 1}: {error}") from error
        if self.context is not None and len(ids) + len(prefix) + room > self.context:
            raise UserError(
                f"probe: conversation {place + 1} has {len(ids) + len(prefix)} tokens, and the model reads at most "
                f"{self.context}: there is no room for an answer of probe.max_new_tokens={room}"
            )
        text = conversation if isinstance(conversation, str) else conversation[-1]["content"]
        return Group([*ids, *prefix], [], index=place, text=text)

    def _with_prefixes(self, found: Answers, forced: Sequence[Sequence[int]]) -> Answers:
        """Return the answers with the tokens that each was made to begin with."""
        token_ids = [[*forced[i // found.num_generations], *ids] for i, ids in enumerate(found.token_ids)]
        ends = self.template.eos_ids | eos_ids(unwrap(self.model))
        texts = [self.template.decode(ids[:-1] if ids and ids[-1] in ends else ids) for ids in token_ids]
        return Answers(
            found.num_generations, found.prompts, found.metadata, token_ids, texts, found.finished, found.scores
        )

    def logprobs(
        self, conversations: Sequence[Prompt], responses: Sequence[str | Sequence[int]], of: str = "model"
    ) -> list[Tensor]:
        """Return the log-probabilities (float32, on the CPU) of the tokens of a response to each conversation.

        The tokens of a text include the end of the turn; those of tokens are as they are.

        Args:
            of: "model", or "reference".

        Raises:
            ValueError: there is no reference.
            UserError: a conversation that the template refuses.
        """
        if of == "reference":
            if self.reference is None:
                raise ValueError("there is no reference")
            return self.reference.logprobs(conversations, responses)
        groups = []
        for place, (conversation, response) in enumerate(zip(conversations, responses, strict=True)):
            prompt = conversation if isinstance(conversation, str) else list(conversation)
            try:
                if isinstance(response, str):
                    ids, (tokens,), _ = self.template.completions(prompt, [response])
                else:
                    ids, tokens = self.template.prompt(prompt), list(response)
            except RowError as error:
                raise UserError(f"probe: conversation {place + 1}: {error}") from error
            if self.context is not None and len(ids) + len(tokens) > self.context:
                raise UserError(
                    f"probe: conversation {place + 1} and its response have {len(ids) + len(tokens)} tokens, and the "
                    f"model reads at most {self.context}"
                )
            groups.append(Group(ids, [tokens], index=place))
        training = self.model.training
        self.model.eval()
        try:
            layout, _ = choose_layout(self.model)
            advance = self._advance("log-probabilities", len(groups))
            found = response_logprobs(CompletionModel(self.model), groups, layout, self.device, progress=advance)
            return [group[0] for group in found]
        finally:
            self.model.train(training)


def question(row: Row) -> str:
    """Return the text by which a row is shown and scored: its last message."""
    prompt = row.get("prompt", row.get("question", ""))
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
