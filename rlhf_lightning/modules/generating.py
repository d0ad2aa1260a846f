"""A stage whose policy generates responses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from rlhf_lightning.data.template import Template
from rlhf_lightning.distributed import data_ranks
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.answers import Answers, answer, start
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.models.completion import CompletionModel
from rlhf_lightning.models.sharding import gathered
from rlhf_lightning.modules.base import MakeOptimizer, MakeSchedule, StageModule
from rlhf_lightning.ops.groups import GroupBatch, GroupList
from rlhf_lightning.rewards.scoring import Reward, score_groups


class Generating(StageModule):
    """A stage whose policy answers prompts: engine, template and options of generation.

    Args:
        engine: generates responses; None is a :class:`LocalEngine`.
        template: decodes responses and names EOS tokens; None takes the data module's.
        num_generations: responses per prompt.
        max_new_tokens, temperature: of generation.
        seed: with iteration, row and generation number it decides every sampled token.
        Others: see :class:`StageModule`.
    """

    policy: CompletionModel | None
    min_responses = 0

    def __init__(
        self,
        load: Callable[[], nn.Module],
        optimizer: MakeOptimizer,
        schedule: MakeSchedule | None = None,
        lora: dict[str, Any] | None = None,
        *,
        engine: Engine | None = None,
        template: Template | None = None,
        num_generations: int = 1,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(load, optimizer, schedule, lora)
        self.engine: Engine = LocalEngine() if engine is None else engine
        self.given_template, self.started = template, False
        self.num_generations, self.max_new_tokens, self.temperature = num_generations, max_new_tokens, temperature
        self.seed = seed

    @property
    def samples(self) -> bool:
        """Whether this process samples from the model that it trains."""
        return isinstance(self.engine, LocalEngine)

    @property
    def template(self) -> Template:
        """The template that was given, else the data module's."""
        template = self.given_template or getattr(self.data, "template", None)
        if template is None:
            raise UserError(
                f"{type(self).__name__}(template=Template(tokenizer)) is needed: the data module has no template"
            )
        return template

    def pack(self, batch: Any) -> GroupList:
        """Return a batch of prompts, and in its `ptx` the demonstrations mixed in, as groups."""
        prompts = self.group_list(batch)
        if isinstance(prompts.ptx, GroupBatch):
            raise UserError("the demonstrations in ptx are spread over updates: give them as groups, not packed")
        if prompts.ptx is not None:
            prompts.ptx = super().group_list(prompts.ptx)
        return prompts

    def group_list(self, batch: Any) -> GroupList:
        prompts = super().group_list(batch)
        if any(group.index < 0 for group in prompts.groups):  # of a user's loader: each needs its own random numbers
            numbers = self.strided(len(prompts))
            groups = [replace(group, index=number) for group, number in zip(prompts.groups, numbers, strict=True)]
            return GroupList(groups, ptx=prompts.ptx)
        return prompts

    def strided(self, count: int) -> range:
        """Return `count` numbers that no other rank has."""
        rank, world_size = data_ranks(self.trainer)
        return range(rank, rank + world_size * count, world_size)

    def generate(
        self, prompts: GroupList, n: int, seed_parts: tuple[int | str, ...], **scorers: Reward | None
    ) -> Answers:
        """Return n responses of the policy to every prompt, with the scores of each reward that is given."""
        assert self.policy is not None
        if not self.started:
            start(self.engine, self.policy.lm, self.template)
            self.started = True
        else:
            self.engine.sync()
        sharded = self.device_mesh is not None
        with gathered(self.policy.lm, sharded and getattr(self.trainer.strategy, "gather_sampling", False)):
            return answer(
                self.engine,
                self.template,
                prompts.groups,
                n,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seed_parts=(self.seed, *seed_parts),
                scorers={name: partial(self.scores, reward) for name, reward in scorers.items() if reward is not None},
                mesh=self.device_mesh,
            )

    def scores(self, reward: Reward, *texts: Any) -> dict[str, Tensor]:
        """Return the scores of responses, see :func:`score_groups`."""
        return score_groups(reward, *texts)

    def teardown(self, stage: str) -> None:
        if self.started:
            self.engine.close()
            self.started = False
