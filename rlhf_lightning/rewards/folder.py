"""The reward of a reward model folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.completion import ScalarModel, choose_layout, unwrap, vocabulary_size
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.models.heads import heads
from rlhf_lightning.models.loading import load_scalar_model, load_tokenizer, resolve_model
from rlhf_lightning.ops.groups import Group, Layout, microbatches
from rlhf_lightning.rewards.groups import MEAN, Combination, GroupedReward


def load_folder(name: str, dtype: str, how: Combination = MEAN) -> FolderReward:
    """Return the reward of a trained reward model."""
    return FolderReward(resolve_model(name, "."), dtype, how=how)


class FolderReward(GroupedReward):
    """Scores text with a trained reward model, through its own tokenizer and template.

    Responses to the same conversation are scored as one completion group, so its prompt is computed once. A model with
    a head per group gives the combination `how` of their normalized scores.

    Raises:
        UserError: the folder holds no reward model, or says nowhere how it writes a conversation.
    """

    def __init__(
        self,
        folder: str,
        dtype: str = "float32",
        batch_tokens: int = 16_384,
        device: str = "cpu",
        how: Combination = MEAN,
    ) -> None:
        model = load_scalar_model(folder, dtype=dtype, trained=True)
        super().__init__(heads(model.config), how)
        tokenizer = load_tokenizer(folder)
        if not tokenizer.chat_template:
            raise UserError(
                f"the reward model {folder} has no chat template, so nothing says how it reads a conversation; put the "
                "template that it was trained with into the folder, as chat_template.jinja"
            )
        self.folder, self.template = folder, Template(tokenizer, "auto")
        self.layout: Layout = choose_layout(model)[0]
        self.vocabulary = vocabulary_size(model)
        self.model = Frozen(ScalarModel(model)).to(device)
        self.batch_tokens = batch_tokens
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9

    @property
    def normalized(self) -> bool:
        """Whether its scores have mean 0 and standard deviation 1 on the held-out rows of its training."""
        config = unwrap(self.model.model.model).config
        mean: Any = getattr(config, "reward_mean", 0.0)
        std: Any = getattr(config, "reward_std", 1.0)
        means, stds = (mean, std) if isinstance(mean, list) else ([mean], [std])
        return any(value != 0 for value in means) or any(value != 1 for value in stds)

    def to(self, device: torch.device | str) -> FolderReward:
        """Move the model and return self."""
        self.model.to(device)
        return self

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        if self.groups:
            return super().__call__(prompts, responses, metadata)
        return self.scores(prompts, responses, metadata)[:, 0]

    def by_group(
        self, prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> dict[str, Tensor]:
        return dict(zip(self.groups, self.scores(prompts, responses, metadata).T, strict=True))

    def scores(self, prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        """Return the normalized scores (S, H) of every head, of a plain reward model (S, 1)."""
        groups: dict[tuple[int, ...], list[int]] = {}
        answers = []
        read: dict[str, tuple[list[int], list[int]]] = {}  # rendering costs more than scoring, and responses repeat
        for i, (text, response, extra) in enumerate(zip(prompts, responses, metadata, strict=True)):
            content = extra.get("messages") or [{"role": "user", "content": text}]
            tools = extra["tools"] if isinstance(extra.get("tools"), list) else None
            conversation = repr((content, tools, response))
            if conversation not in read:
                try:
                    prompt, (answer,), _ = self.template.completions(content, [response], tools)
                except RowError as error:
                    raise UserError(f"the reward model {self.folder} cannot read a response: {error}") from error
                read[conversation] = prompt, answer
            prompt, answer = read[conversation]
            worst = max(max(prompt), max(answer))
            if worst >= self.vocabulary:
                raise UserError(
                    f"the reward model {self.folder} has {self.vocabulary} ids, and its tokenizer gives the id {worst} "
                    f"in a response to {text[:80]!r}; the model was not resized for its tokenizer"
                )
            answers.append(answer[: max(self.context - len(prompt), 1)])
            groups.setdefault(tuple(prompt), []).append(i)
        packed = [Group(prompt, [answers[i] for i in members]) for prompt, members in groups.items()]
        scores = torch.zeros(len(responses), max(len(self.groups), 1))
        members = list(groups.values())
        device = next(self.model.model.parameters()).device
        row_tokens = 2 * max(group.tokens for group in packed)  # short rows cost little attention
        for places, batch in microbatches(packed, self.batch_tokens, self.layout, row_tokens):
            found = self.model(batch.to(device)).cpu().view(batch.sequences, -1)
            scores[[member for place in places for member in members[place]]] = found
        return scores
