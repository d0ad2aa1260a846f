"""Answering prompts: generate, decode and score, in the one place that every stage uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf_lightning.data.template import Template
from rlhf_lightning.generation.engine import Engine, check_engine
from rlhf_lightning.models.completion import unwrap
from rlhf_lightning.models.ends import eos_ids
from rlhf_lightning.models.sharding import broadcast_tp
from rlhf_lightning.ops.groups import Group

Scorer = Callable[[Sequence[str], Sequence[str], Sequence[dict[str, Any]]], Tensor | dict[str, Tensor]]


@dataclass(frozen=True)
class Answers:
    """n responses to each of P prompts, S = P n, prompt by prompt.

    `prompts`, `metadata`, `token_ids`, `texts` and `finished` have length S; `metadata` includes whether the
    response is finished. `scores` has a tensor (S,) for every scorer, and one as <scorer>_<part> for each of its parts.
    `logprobs` are the engine's own of the sampled tokens, None where it gives none.
    """

    num_generations: int
    prompts: list[str]
    metadata: list[dict[str, Any]]
    token_ids: list[list[int]]
    texts: list[str]
    finished: list[bool]
    scores: dict[str, Tensor]
    logprobs: list[list[float]] | None = None

    def of_prompt(self, place: int) -> slice:
        """Return where the responses to the prompt at `place` stand."""
        return slice(place * self.num_generations, (place + 1) * self.num_generations)

    def groups(self, prompts: Sequence[Group]) -> list[Group]:
        """Return the completion groups of the prompts they answer, for log-probabilities."""
        return [
            Group(group.prompt, self.token_ids[self.of_prompt(place)], index=group.index)
            for place, group in enumerate(prompts)
        ]


def start(engine: Engine, lm: Any, template: Template) -> None:
    """Start `engine` with every token that ends a response, the template's and those of the model's configs, and sync.

    Raises:
        UserError: it is no engine, or has other weights than the model.
    """
    check_engine(engine)
    engine.start(lm, template.eos_ids | eos_ids(unwrap(lm)))
    try:
        engine.sync()
    except BaseException:
        engine.close()
        raise


def prompt_text(group: Group, template: Template) -> str:
    """Return the prompt as rewards read it: the last user turn, or the decoded prompt of a group without text."""
    return template.decode(group.prompt) if group.text is None else group.text


def answer(
    engine: Engine,
    template: Template,
    prompts: Sequence[Group],
    num_generations: int = 1,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed_parts: Sequence[int | str] = (0,),
    scorers: Mapping[str, Scorer] | None = None,
    mesh: Any = None,
    progress: Callable[[int], Any] | None = None,
) -> Answers:
    """Return the responses of a started engine to `prompts` and the scores of each scorer.

    Args:
        template: decodes responses.
        prompts: groups whose prompt is read; `index`, with `seed_parts`, decides the sampled tokens.
        scorers: name -> callable (prompts, responses, metadata) -> (S,), as :func:`rewards.scoring.score`, or with
            parts as :func:`rewards.scoring.score_groups`.
        mesh: the module's device mesh; ranks that share every layer get the answers of the first of them.
        progress: called with the number of prompts done after each batch.
    """
    generations = broadcast_tp(
        mesh,
        engine.generate(
            [list(group.prompt) for group in prompts],
            num_generations,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed_parts=seed_parts,
            ids=[group.index for group in prompts],
            progress=progress,
        ),
    )
    texts = [
        # an EOS of the model that the template does not know is no text
        template.decode(ids[:-1] if done and ids[-1] not in template.eos_ids else ids)
        for ids, done in zip(generations.responses, generations.finished, strict=True)
    ]
    prompt_texts = [prompt_text(group, template) for group in prompts for _ in range(num_generations)]
    columns = [dict(group.metadata) for group in prompts for _ in range(num_generations)]
    metadata = [row | {"finished": done} for row, done in zip(columns, generations.finished, strict=True)]
    scores: dict[str, Tensor] = {}
    for name, scorer in (scorers or {}).items() if texts else ():
        scored = broadcast_tp(mesh, scorer(prompt_texts, texts, metadata))
        parts = scored if isinstance(scored, dict) else {"": scored}
        scores |= {f"{name}_{part}" if part else name: values for part, values in parts.items()}
    return Answers(
        num_generations, prompt_texts, metadata, generations.responses, texts, generations.finished, scores,
        generations.logprobs,
    )  # fmt: skip
