"""Evaluating a reward model on held-out preferences."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_lightning.data.checks import ids_fit
from rlhf_lightning.data.datamodules import PreferenceData
from rlhf_lightning.models.completion import ScalarModel, choose_layout, vocabulary_size
from rlhf_lightning.ops.ranking import pairs_in_order, ranked_pairs
from rlhf_lightning.ops.statistics import Interval, share_interval


@torch.no_grad()
def evaluate_reward_model(model: Any, data: PreferenceData, device: str = "cpu") -> tuple[dict[str, Interval], int]:
    """Return the accuracy on the held-out pairs of `data` with its interval, and the number of pairs.

    The pairs of one prompt, whether of one ranking or of several rows, are not independent.
    """
    ids_fit(data, "val", vocabulary_size(model))
    model.to(device).eval()
    layout, _ = choose_layout(model)
    scorer, correct, prompts = ScalarModel(model), [], []
    for groups in data.val_dataloader():
        batch = groups.pack(layout).to(device)
        scores = scorer(batch)
        better, worse = ranked_pairs(batch.ranks, batch.group_of)
        correct += pairs_in_order(scores[better] - scores[worse]).tolist()
        prompts += [tuple(groups.groups[group].prompt) for group in batch.group_of[better].tolist()]
    return {"accuracy": share_interval(correct, prompts)}, len(correct)
