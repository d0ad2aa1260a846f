"""Candidates: several responses to every prompt and a score for each, on all devices, through `Trainer.predict`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rlhf_lightning.data.checks import ids_fit
from rlhf_lightning.data.comparisons import OF_OTHERS
from rlhf_lightning.data.records import RowError, given_responses
from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.generation.answers import prompt_text
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.models.completion import CompletionModel
from rlhf_lightning.models.sharding import broadcast_tp
from rlhf_lightning.modules.base import MakeOptimizer, MakeSchedule
from rlhf_lightning.modules.generating import Generating
from rlhf_lightning.ops.groups import GroupList
from rlhf_lightning.ops.ranking import text_ranks
from rlhf_lightning.rewards.ensemble import DISAGREEMENT
from rlhf_lightning.rewards.scoring import Reward, score_groups, to_device


class Candidates(Generating):
    """Answers every prompt and scores the answers; each prediction is a row that preference data can be read from.

    Args:
        reward: callable, see :mod:`rlhf_lightning.rewards.scoring`, or None for no scores.
        num_generations: responses per prompt; 0 scores the responses that the rows already have.
        Others: see :class:`Generating`.
    """

    policy: CompletionModel | None

    def __init__(
        self,
        load: Callable[[], nn.Module],
        optimizer: MakeOptimizer,
        schedule: MakeSchedule | None = None,
        lora: dict[str, Any] | None = None,
        *,
        reward: Reward | None = None,
        engine: Engine | None = None,
        template: Template | None = None,
        num_generations: int = 4,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            load, optimizer, schedule, lora, engine=engine, template=template, num_generations=num_generations,
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        )  # fmt: skip
        check_number("candidates.num_generations", num_generations, "[0, inf)", whole=True)
        check_number("candidates.max_new_tokens", max_new_tokens, "[1, inf)", whole=True)
        check_number("candidates.temperature", temperature, "[0, inf)")
        if not num_generations and reward is None:
            raise UserError(
                "candidates.num_generations=0 scores the responses of the rows: give reward_from=<what scores them>"
            )
        self.reward = reward

    def configure_model(self) -> None:
        if not hasattr(self, "policy"):
            self.policy = self.split(CompletionModel(self.build())) if self.num_generations else None

    def trained_model(self) -> Any:
        return self.policy.lm if self.policy is not None else None

    def on_predict_start(self) -> None:
        to_device(self.reward, self.device)
        if self.policy is not None:
            ids_fit(self.data, "train", self.vocabulary)

    @torch.no_grad()
    def predict_step(self, batch: GroupList, batch_idx: int) -> list[dict[str, Any]]:
        """Return for every prompt its number `row`, and as `value` prompt, responses and their other columns.

        A better score has a lower number in `ranking`. A batch without prompts makes the dummy forward passes that
        match the collectives of other ranks.
        """
        responses = self.generated(batch) if self.policy is not None else self.given(batch)
        scores = self.scored(batch, responses)
        rows = []
        for place, group in enumerate(batch.groups):
            extra = dict(group.metadata)
            value: dict[str, Any] = {"prompt": extra.get("messages") or prompt_text(group, self.template)}
            value |= {name: column for name, column in extra.items() if name not in OF_OTHERS}
            value |= responses[place]
            if scores is not None:
                mine = {name: values[place] for name, values in scores.items()}
                value["scores"] = mine.pop("")
                if DISAGREEMENT in mine:
                    value[DISAGREEMENT] = mine.pop(DISAGREEMENT)
                value |= {"group_scores": mine} if mine else {}
                value["ranking"] = text_ranks(value["responses"], value["scores"])
            rows.append({"row": group.index, "value": value})
        return rows

    def generated(self, prompts: GroupList) -> list[dict[str, Any]]:
        """Return per prompt the sampled responses, whether each ended with EOS, and its number of tokens."""
        answers = self.generate(prompts, self.num_generations, ("candidates",))
        lengths = [len(ids) for ids in answers.token_ids]
        parts = [answers.of_prompt(place) for place in range(len(prompts))]
        return [{"responses": answers.texts[p], "finished": answers.finished[p], "tokens": lengths[p]} for p in parts]

    def given(self, prompts: GroupList) -> list[dict[str, Any]]:
        """Return the responses that the rows have: a list `responses`, or a pair, the chosen one first."""
        rows = [{"responses": self.responses_of(group.index)} for group in prompts.groups]
        for row, group in zip(rows, prompts.groups, strict=True):
            for name in ("finished", "tokens"):  # where an earlier run wrote them
                column = group.metadata.get(name)
                if isinstance(column, list) and len(column) == len(row["responses"]):
                    row[name] = column
        return rows

    def responses_of(self, number: int) -> list[str]:
        try:
            return given_responses(self.data.rows["train"].raw(number), self.data.columns)
        except RowError as error:
            raise UserError(f"{self.data.where('train', [number])} has no responses to score: {error}") from error

    def scored(self, batch: GroupList, responses: list[dict[str, Any]]) -> dict[str, list[list[float]]] | None:
        """Return as "" the scores of every prompt's responses, by name their parts; None where there are none."""
        prompts, texts, metadata = [], [], []
        for group, row in zip(batch.groups, responses, strict=True):
            for k, response in enumerate(row["responses"]):
                prompts.append(prompt_text(group, self.template))
                texts.append(response)
                metadata.append(dict(group.metadata) | ({"finished": row["finished"][k]} if "finished" in row else {}))
        if self.reward is None or not texts:
            return None
        parts = broadcast_tp(self.device_mesh, score_groups(self.reward, prompts, texts, metadata))
        sizes = [len(row["responses"]) for row in responses]
        return {name: [part.tolist() for part in values.split(sizes)] for name, values in parts.items()}
