"""Checks of a reward on the responses of the data, or on the model's own answers where the rows are prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.data.checks import Check, Note
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.audit.data import DataChecks
from rlhf_lightning.evaluation.audit.model import ModelChecks
from rlhf_lightning.rewards.scoring import Reward, score


class RewardChecks:
    """The reward that `reward_from` names."""

    def __init__(self, reward: Reward, rows: DataChecks, model: ModelChecks) -> None:
        self.reward, self.rows, self.model = reward, rows, model

    def checks(self) -> Iterator[Check]:
        """Yield the checks."""
        yield "rewards are numbers that differ", self.differ
        yield "the same text gets the same reward", self.same

    def texts(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Return (prompt, response, other columns) of the texts to score."""
        data, answers = self.model.data, self.model.answers
        if data.kind == "prompts" and answers is not None:
            return list(zip(answers.prompts, answers.texts, answers.metadata, strict=True))
        texts = []
        for _, prompt, answers, _, columns in self.rows.conversations():
            text = next(m["content"] for m in reversed(prompt) if m["role"] == "user")
            texts += [(text, answer["content"], columns | {"finished": True}) for answer in answers]
        return texts

    def scores(self, texts: list[tuple[str, str, dict[str, Any]]]) -> Tensor:
        """Return one reward per text."""
        return score(self.reward, *map(list, zip(*texts, strict=True)))  # type: ignore[arg-type]

    def differ(self) -> str:
        """Rewards are finite and not all the same; a note where they follow the length."""
        texts = self.texts()
        scores = self.scores(texts)
        spread = scores.std(correction=0).item()
        if spread == 0:
            raise UserError(f"all {len(scores)} rewards are {scores[0].item():.3g}: there is nothing to learn from")
        lengths = torch.tensor([float(len(text)) for _, text, _ in texts])
        correlation = torch.corrcoef(torch.stack([lengths, scores]))[0, 1].item() if lengths.std() > 0 else 0.0
        text = f"{len(scores)} texts, mean {scores.mean().item():.3g}, standard deviation {spread:.3g}"
        text += f", correlation with length {correlation:.2f}"
        return Note(text) if abs(correlation) > 0.7 else text

    def same(self) -> str:
        """A reward depends neither on the order of texts nor on the rest of the batch."""
        texts = self.texts()
        backwards, half = texts[::-1], len(texts) // 2
        again = torch.cat([self.scores(part) for part in (backwards[:half], backwards[half:]) if part])
        scores = self.scores(texts)
        gaps = (again.flip(0) - scores).abs()
        if gaps.max() > 1e-3 * max(1.0, scores.abs().max().item()):
            text = texts[int(gaps.argmax())][1][:200]
            raise UserError(f"the reward of {text!r} differs by {gaps.max().item():.2g} in another batch")
        return (
            f"{len(scores)} texts, in another order and other batches: they differ by at most {gaps.max().item():.1g}"
        )
