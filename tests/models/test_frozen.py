"""A frozen model: no dropout, no gradient, and no part of the module that holds it."""

from __future__ import annotations

import torch
from torch import nn

from rlhf_lightning.models.frozen import Frozen


def test_a_frozen_model_neither_drops_out_nor_learns() -> None:
    model = nn.Sequential(
        nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 2)
    ).train()  # models are loaded in train mode
    frozen = Frozen(model)
    rows = torch.ones(1, 3, requires_grad=True)
    first, second = frozen(rows), frozen(rows)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not any(p.requires_grad for p in model.parameters())


def test_the_mode_of_its_holder_does_not_reach_it() -> None:
    holder = nn.Module()
    frozen = Frozen(nn.Dropout(0.5))
    holder.reference = frozen  # type: ignore[assignment]
    holder.train()
    assert not frozen.model.training
    assert not list(holder.children())
    assert not holder.state_dict()
