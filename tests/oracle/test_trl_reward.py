"""Reward models: loss, gradient norm and ten optimizer steps equal TRL's RewardTrainer."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import PreferenceData, RewardModel
from tests.helpers.lightning import quiet_lightning
from tests.oracle.side_by_side import (
    BATCH,
    arguments,
    assert_same,
    classifier,
    in_our_order,
    optimizer,
    our_tokens,
    preferences,
    tokenizer,
    train_ours,
    train_theirs,
)

trl = pytest.importorskip("trl", reason="TRL is absent: pip install 'rlhf-lightning[oracle]'")
pytestmark = pytest.mark.oracle


def with_margins() -> list[dict[str, Any]]:
    draw = random.Random(3)
    return [row | {"margin": round(draw.uniform(-1, 3), 2)} for row in preferences()]


@pytest.mark.parametrize("center", [0.0, 0.3], ids=["plain", "centred"])
@pytest.mark.parametrize("rows", [preferences(), with_margins()], ids=["pairs", "margins"])
@quiet_lightning
def test_bradley_terry(tmp_path: Path, rows: list[dict[str, Any]], center: float) -> None:
    data = PreferenceData(tokenizer(tmp_path), rows, batch_size=BATCH, cache_dir=tmp_path, row_tokens=64)
    theirs = trl.RewardTrainer(
        classifier(tmp_path),
        arguments(trl.RewardConfig, tmp_path, center_rewards_coefficient=center or None),
        train_dataset=in_our_order(data, rows),
        processing_class=tokenizer(tmp_path),
    )
    for group, row in zip(our_tokens(data), theirs.train_dataset, strict=True):
        assert [[*group.prompt, *y] for y in group.responses] == [row["chosen_ids"], row["rejected_ids"]]
        assert group.margin == row.get("margin", 0.0)
    ours = RewardModel(partial(classifier, tmp_path), optimizer(), center=center)
    assert_same(train_ours(ours, data), train_theirs(theirs))
