"""Evaluating a reward model on held-out preferences."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_lightning.data.checks import ids_fit
from rlhf_lightning.data.datamodules import PreferenceData
from rlhf_lightning.models.completion import ScalarModel, choose_layout, vocabulary_size
from rlhf_lightning.ops.ranking import pairwise_ranking
from rlhf_lightning.ops.statistics import Interval, wilson_interval


@torch.no_grad()
def evaluate_reward_model(model: Any, data: PreferenceData, device: str = "cpu") -> tuple[dict[str, Interval], int]:
    """Return the accuracy on the held-out pairs of `data` with its Wilson interval, and the number of pairs."""
    ids_fit(data, "val", vocabulary_size(model))
    model.to(device).eval()
    layout, _ = choose_layout(model)
    scorer, correct, pairs = ScalarModel(model), 0.0, 0
    for groups in data.val_dataloader():
        batch = groups.pack(layout).to(device)
        _, gaps = pairwise_ranking(scorer(batch), batch.ranks, batch.group_of, batch.margins, batch.labels)
        correct += float((gaps > 0).sum() + 0.5 * (gaps == 0).sum())
        pairs += len(gaps)
    return {"accuracy": (correct / pairs, *wilson_interval(correct, pairs))}, pairs
