"""Advantages of RLOO and GRPO equal what TRL's trainers compute from the same scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_lightning.ops.advantages import grpo, rloo, whiten
from tests.oracle.replay import PROMPTS, SAMPLES, Script, score, their_trainer
from tests.oracle.side_by_side import conversation, quiet_trl

trl = pytest.importorskip("trl", reason="TRL is absent: pip install 'rlhf-lightning[oracle]'")
pytestmark = pytest.mark.oracle


def computed(folder: Path, kind: Any, settings: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the scores of a step and TRL's advantages, both (prompts, samples)."""
    trainer = their_trainer(folder, Script(), kind, settings, **options)
    rows = [conversation({"prompt": p}) for p in PROMPTS for _ in range(SAMPLES)]
    found = trainer._generate_and_score_completions(rows)
    lengths = found["completion_mask"].sum(1)
    completions = [ids[:length].tolist() for ids, length in zip(found["completion_ids"], lengths, strict=True)]
    scores = torch.tensor([score(y) for y in completions])
    return scores.view(-1, SAMPLES), found["advantages"].view(-1, SAMPLES)


@pytest.mark.parametrize(("scale_rewards", "scale"), [("group", True), ("none", False)])
@quiet_trl
def test_grpo(tmp_path: Path, scale_rewards: str, scale: bool) -> None:
    """Sample deviation plus 1e-4 on both sides; without it, Dr. GRPO's."""
    scores, advantages = computed(tmp_path, trl.GRPOTrainer, trl.GRPOConfig, scale_rewards=scale_rewards)
    assert advantages.abs().max() > 0.3
    assert_close(grpo(scores, scale), advantages, rtol=1e-5, atol=1e-6)


@quiet_trl
def test_rloo(tmp_path: Path) -> None:
    scores, advantages = computed(tmp_path, trl.RLOOTrainer, trl.RLOOConfig, beta=0.0)
    assert advantages.abs().max() > 0.3
    assert_close(rloo(scores), advantages, rtol=1e-5, atol=1e-6)


@quiet_trl
def test_rloo_normalized(tmp_path: Path) -> None:
    """TRL adds 1e-4 to the deviation with n - 1, we 1e-8 to the variance with n, and over tokens, not responses."""
    options = {"beta": 0.0, "normalize_advantages": True}
    scores, advantages = computed(tmp_path, trl.RLOOTrainer, trl.RLOOConfig, **options)
    raw = rloo(scores)
    ours = whiten(raw, torch.ones_like(raw, dtype=torch.bool))  # responses of one token
    factor = (raw.var(correction=0) + 1e-8).sqrt() / (raw.std() + 1e-4)
    assert factor < 0.97
    assert_close(ours * factor, advantages, rtol=1e-5, atol=1e-6)
