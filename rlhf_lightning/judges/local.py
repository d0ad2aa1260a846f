"""A judge in this process: a causal language model, by the probabilities of verdict tokens or by what it writes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_lightning.data.messages import RowError, turn
from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.generation.answers import answer, start
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.judges.cache import cached
from rlhf_lightning.judges.language import LanguageJudge
from rlhf_lightning.judges.questions import Question, Reply
from rlhf_lightning.models.completion import CompletionModel, choose_layout
from rlhf_lightning.models.folder import weights_key
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.models.loading import context_length, load_causal_lm, load_tokenizer, resolve_model
from rlhf_lightning.ops.groups import Group, Layout, microbatches
from rlhf_lightning.ops.seeding import derive_seed

CHUNK = 64
"""Questions that are sorted by length and read together; replies come in this grain."""


def local_judge(
    model: str,
    *,
    dtype: str = "float32",
    template: str = "auto",
    batch_tokens: int = 16_384,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    cache: str | Path | None = None,
    seed: int = 0,
    name: str | None = None,
    method: str = "logprobs",
    rubric: str | None = None,
    scale: int = 5,
    constitution: Any = None,
    samples: int = 1,
    on_failure: str = "skip",
) -> LanguageJudge:
    """Return a judge that is a language model in this process.

    Args:
        model: a model folder, GGUF file, hub name or "smollm2".
        dtype: of its weights.
        template: as of :class:`Template`.
        batch_tokens: tokens that are read at a time; changes memory, not results.
        max_new_tokens, temperature: of written answers.
        cache: folder where replies are kept; None keeps none.
        Others: see :class:`LanguageJudge`.
    """
    if not model:
        raise UserError("judge=local needs judge.model=<model folder, GGUF file or hub name>")
    own = os.environ.get("RLHF_CACHE") or Path.home() / ".cache" / "rlhf_lightning"
    folder = resolve_model(str(model), own)
    named = name or Path(str(model)).name
    answers = LocalModel(
        load_causal_lm(folder, dtype=dtype),
        Template(load_tokenizer(folder), template),
        name=named,
        identity={"weights": weights_key(folder) or folder, "dtype": dtype, "template": template},
        context=context_length(folder),
        batch_tokens=batch_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    return LanguageJudge(
        cached(answers, cache), name=named, method=method, rubric=rubric, scale=scale, constitution=constitution,
        samples=samples, temperature=temperature, on_failure=on_failure, seed=seed,
    )  # fmt: skip


class LocalModel:
    """Answers questions with a causal language model.

    Args:
        lm: a Hugging Face causal LM.
        template: encodes questions.
        name, identity: see :class:`Model`.
        context: its context length in tokens, None where it has none.
        engine: samples written answers; None is the one in this process.
    """

    def __init__(
        self,
        lm: Any,
        template: Template,
        *,
        name: str = "local",
        identity: dict[str, Any] | None = None,
        context: int | None = None,
        batch_tokens: int = 16_384,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        engine: Engine | None = None,
    ) -> None:
        check_number("judge.batch_tokens", batch_tokens, "[1, inf)", whole=True)
        check_number("judge.max_new_tokens", max_new_tokens, "[1, inf)", whole=True)
        check_number("judge.temperature", temperature, "[0, inf)")
        self.name, self.template, self.context, self.seed = name, template, context, seed
        self.batch_tokens, self.max_new_tokens, self.temperature = batch_tokens, max_new_tokens, temperature
        self.layout: Layout = choose_layout(lm)[0]
        self.model = Frozen(CompletionModel(lm))
        self.engine = engine or LocalEngine(batch_tokens)
        start(self.engine, lm, template)
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature} | (
            {"seed": seed} if temperature else {}
        )
        self.identity = {**(identity or {"name": name}), "written": sampling}

    def to(self, device: torch.device | str) -> LocalModel:
        """Move the model and return self."""
        self.model.to(device)
        return self

    def close(self) -> None:
        """Release the model."""
        self.engine.close()

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Yield the replies, see :meth:`Model.ask`; a question that is too long fails."""
        for begin in range(0, len(questions), CHUNK):
            prompts: dict[int, list[int]] = {}
            for place in range(begin, min(begin + CHUNK, len(questions))):
                try:
                    prompts[place] = self._encoded(questions[place])
                except RowError as error:
                    yield place, Reply(failure=str(error))
            yield from self._probabilities({p: ids for p, ids in prompts.items() if questions[p].options}, questions)
            yield from self._written({p: ids for p, ids in prompts.items() if not questions[p].options}, questions)

    def _encoded(self, question: Question) -> list[int]:
        ids = self.template.prompt([turn("user", question.text)])
        room = 1 if question.options else self.max_new_tokens
        if self.context is not None and len(ids) + room > self.context:
            raise RowError(f"the question has {len(ids)} tokens, and {room} more is over the model's {self.context}")
        return ids

    def _probabilities(
        self, prompts: dict[int, list[int]], questions: Sequence[Question]
    ) -> Iterator[tuple[int, Reply]]:
        """Yield the probabilities of the options: a question is a completion group, a first token each response."""
        if not prompts:
            return
        places = list(prompts)
        tokens = [[self._first_tokens(option) for option in questions[place].options] for place in places]
        groups = [
            Group(prompts[place], [[token] for option in options for token in option])
            for place, options in zip(places, tokens, strict=True)
        ]
        device = next(self.model.model.parameters()).device
        for members, batch in microbatches(groups, self.batch_tokens, self.layout):
            began = time.perf_counter()
            parts = iter(self.model(batch.to(device)).logprobs.float().exp().cpu().tolist())
            seconds = (time.perf_counter() - began) / len(members)
            for member in members:
                shares = tuple(sum(next(parts) for _ in option) for option in tokens[member])
                size = len(groups[member].prompt)
                yield places[member], Reply(probabilities=shares, prompt_tokens=size, seconds=seconds)

    def _first_tokens(self, option: str) -> list[int]:
        """Return the tokens that begin an answer with `option`, with a space before it or without.

        Raises:
            UserError: the tokenizer has no token for it.
        """
        found = {tuple(self.template.content(text)) for text in (option, f" {option}")}
        single = sorted(ids[0] for ids in found if len(ids) == 1)
        if not single:
            raise UserError(f"the tokenizer of {self.name} has no token for {option}: use judge.method=generate")
        return single

    def _written(self, prompts: dict[int, list[int]], questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Yield what the model writes; a question and its sample number decide every token."""
        if not prompts:
            return
        began = time.perf_counter()
        groups = [
            Group(ids, [], index=derive_seed(questions[place].text, questions[place].sample))
            for place, ids in prompts.items()
        ]
        answers = answer(
            self.engine, self.template, groups, max_new_tokens=self.max_new_tokens, temperature=self.temperature,
            seed_parts=(self.seed, "judge"),
        )  # fmt: skip
        seconds = (time.perf_counter() - began) / len(groups)
        for number, (place, ids) in enumerate(prompts.items()):
            written = len(answers.token_ids[number])
            yield place, Reply(answers.texts[number], None, None, len(ids), written, seconds)
