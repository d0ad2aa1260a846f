"""Candidates: several responses to every prompt and a score for each, on all devices, through `Trainer.predict`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlhf_lightning.data.datamodules import PromptBatch
from rlhf_lightning.data.records import RowError, preference
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.local import Sampler, Samples
from rlhf_lightning.models.completion import CompletionModel
from rlhf_lightning.models.sharding import shared
from rlhf_lightning.modules.base import StageModule
from rlhf_lightning.rewards.loading import FolderReward, MeanReward, Reward, score

OF_OTHERS = {"ranking", "scores", "margin", "label", "annotator"}  # columns that say something of other responses


class Candidates(StageModule):
    """Answers every prompt and scores the answers; each prediction is a row that preference data can be read from.

    Args:
        reward: callable, see :mod:`rlhf_lightning.rewards.loading`, or None for no scores.
        samples: responses a prompt; 0 scores the responses that the rows already have.
        max_new_tokens, temperature: of sampling.
        sampler: see :class:`rlhf_lightning.modules.experience.Experience`.
        seed: with row and sample number it decides every sampled token.
        Others: see :class:`StageModule`.
    """

    policy: CompletionModel | None

    def __init__(
        self,
        *args: Any,
        reward: Reward | None = None,
        samples: int = 4,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        sampler: Callable[..., Callable[..., Samples]] = Sampler,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if samples < 0 or max_new_tokens < 1:
            raise UserError("candidates.samples must not be negative, candidates.max_new_tokens at least 1")
        if not samples and reward is None:
            raise UserError(
                "candidates.samples=0 scores the responses of the rows: give reward_from=<what scores them>"
            )
        self.reward, self.samples, self.max_new_tokens, self.temperature = reward, samples, max_new_tokens, temperature
        self.make_sampler, self.seed = sampler, seed

    def configure_model(self) -> None:
        if not hasattr(self, "policy"):
            self.policy = self.split(CompletionModel(self.build())) if self.samples else None

    def on_predict_start(self) -> None:
        if isinstance(self.reward, FolderReward | MeanReward):
            self.reward.to(self.device)

    @torch.no_grad()
    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return for every prompt its number `row`, and as `value` prompt, responses and what is known of each.

        A better score has a lower number in `ranking`; a batch without prompts keeps another rank company.
        """
        drawn = self.draw(batch) if self.policy is not None else self.given(batch)
        counts = [len(row["responses"]) for row in drawn]
        scores = self.scored(batch, drawn) if self.reward is not None and any(counts) else None
        rows = []
        for number, (text, extra, found) in enumerate(zip(batch.prompts, batch.metadata, drawn, strict=True)):
            value = {"prompt": extra.get("messages") or text}
            value |= {name: held for name, held in extra.items() if name not in OF_OTHERS | {"messages"}} | found
            if scores is not None:
                of_row = scores[sum(counts[:number]) :][: counts[number]]
                texts = [response.strip() for response in found["responses"]]
                fair = [of_row[texts.index(same)] for same in texts]  # rounding must not rank a text above itself
                better = sorted(set(fair), reverse=True)
                value |= {"scores": of_row, "ranking": [better.index(score) for score in fair]}
            rows.append({"row": batch.index[number], "value": value})
        return rows

    def draw(self, batch: PromptBatch) -> list[dict[str, Any]]:
        """Return sampled responses, whether each ended by itself, and its number of tokens, a dict a prompt."""
        assert self.policy is not None
        n, template = self.samples, self.data.template
        sampler = self.make_sampler(self.policy.lm, template.eos_ids, self.max_new_tokens, self.temperature)
        drawn = shared(self.device_mesh, sampler(batch.prompt_ids, n, (self.seed, "candidates"), batch.index))
        texts = [template.decode(ids) for ids in drawn.responses]
        lengths = [len(ids) for ids in drawn.responses]
        return [
            {"responses": texts[part], "finished": drawn.finished[part], "tokens": lengths[part]}
            for part in (slice(i * n, (i + 1) * n) for i in range(len(batch.prompts)))
        ]

    def given(self, batch: PromptBatch) -> list[dict[str, Any]]:
        """Return the responses that the rows have: a list `responses`, or a pair, the chosen one first."""
        drawn = [{"responses": self.responses_of(row)} for row in batch.index]
        for found, extra in zip(drawn, batch.metadata, strict=True):
            for name in ("finished", "tokens"):  # where an earlier run wrote them
                if isinstance(extra.get(name), list) and len(extra[name]) == len(found["responses"]):
                    found[name] = extra[name]
        return drawn

    def responses_of(self, number: int) -> list[str]:
        row = self.data.rows["train"].raw(number)
        listed = row.get("responses")
        if isinstance(listed, list) and listed and all(isinstance(text, str) for text in listed):
            return listed
        try:
            return preference(row).responses
        except RowError as error:
            raise UserError(f"{self.data.where('train', [number])} has no responses to score: {error}") from error

    def scored(self, batch: PromptBatch, drawn: list[dict[str, Any]]) -> list[float]:
        """Return the score of every response, prompt by prompt."""
        assert self.reward is not None
        prompts, responses, metadata = [], [], []
        for text, extra, found in zip(batch.prompts, batch.metadata, drawn, strict=True):
            for k, response in enumerate(found["responses"]):
                prompts.append(text)
                responses.append(response)
                metadata.append(extra | ({"finished": found["finished"][k]} if "finished" in found else {}))
        return shared(self.device_mesh, score(self.reward, prompts, responses, metadata)).tolist()
