"""The rollout keeps flat model outputs and (S, T) tensors in step, whatever the layout and the microbatch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_lightning.modules.rollout import Rollout
from rlhf_lightning.ops.groups import Group, GroupBatch, Layout

GROUPS = [
    Group([1, 5, 6, 7, 8, 9], [[8, 9, 2], [10]]),
    Group([1], [[11, 12, 13, 14, 15], [16, 2]]),
    Group([1, 20, 21], [[22], [23, 24, 25]]),
]
LENGTHS = [3, 1, 5, 2, 1, 3]


def rollout(layout: Layout = "packed", budget: int = 4096) -> Rollout:
    finished = torch.tensor([True, False, False, True, False, False])
    return Rollout(GROUPS, 2, finished, torch.zeros(6), layout, torch.device("cpu"), budget)


def test_mask_follows_lengths_not_end_tokens() -> None:
    mask = rollout().mask
    assert mask.sum(1).tolist() == LENGTHS
    assert mask.shape == (6, 5)
    assert not (mask.int().diff(dim=1) > 0).any()  # padded on the right


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("budget", [1, 12, 4096])
def test_fill_puts_every_token_in_its_place(layout: Layout, budget: int) -> None:
    made = rollout(layout, budget)
    made.fill(lambda batch: {"targets": batch.targets, "seen": torch.ones(len(batch.targets))})
    responses = [response for group in GROUPS for response in group.responses]
    for row, response in enumerate(responses):
        assert made.tokens["targets"][row, : len(response)].tolist() == response
        assert not made.tokens["targets"][row, len(response) :].any()
    assert torch.equal(made.tokens["seen"].bool(), made.mask)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("budget", [1, 12, 4096])
def test_flat_gives_back_the_order_of_the_batch(layout: Layout, budget: int) -> None:
    made = rollout(layout, budget)
    made.fill(lambda batch: {"targets": batch.targets})
    seen: list[int] = []
    for cells, batch, _ in made.microbatches([2, 0]):
        assert made.flat("targets", cells).tolist() == batch.targets.tolist()
        seen += cells.tolist()
    expected = made.mask.clone()
    expected[[2, 3]] = False
    assert sorted(seen) == expected.flatten().nonzero().flatten().tolist()


def test_microbatches_keep_to_the_budget() -> None:
    def sizes(budget: int) -> list[int]:
        return [int((batch.group_ids >= 0).sum()) for _, batch, _ in rollout(budget=budget).microbatches([0, 1, 2])]

    assert sizes(1) == [10, 8, 7]  # a group is never cut
    assert sizes(18) == [18, 7]
    assert sizes(25) == [25]


def test_rows_are_prompt_major() -> None:
    assert rollout().rows([2, 0]).tolist() == [4, 5, 0, 1]


def test_values_are_stored_as_float32_without_a_graph_when_asked() -> None:
    weight = torch.ones((), requires_grad=True)

    def compute(batch: GroupBatch) -> dict[str, Tensor]:
        return {"half": (batch.targets * weight).to(torch.bfloat16)}

    made = rollout()
    with torch.no_grad():
        made.fill(compute)
    assert made.tokens["half"].dtype == torch.float32
    assert not made.tokens["half"].requires_grad
