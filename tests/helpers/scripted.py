"""An engine that returns planted answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rlhf_lightning.data.template import Template
from rlhf_lightning.generation.engine import Engine, Generations


class ScriptedEngine(Engine):
    """Answers what a function says to the text of a prompt, the tokens of a forced opening included."""

    def __init__(self, template: Template, says: Callable[[str], str]) -> None:
        self.template, self.says, self.asked = template, says, list[str]()

    def start(self, lm: Any, eos_ids: Iterable[int]) -> None: ...

    def generate(self, prompts: Sequence[Sequence[int]], num_generations: int = 1, **_: Any) -> Generations:
        self.asked += [self.template.tokenizer.decode(ids) for ids in prompts]
        texts = [self.says(text) for text in self.asked[-len(prompts) :] for _ in range(num_generations)]
        return Generations([[*self.template.content(t), self.template.end[-1]] for t in texts], [True] * len(texts))

    def close(self) -> None: ...
