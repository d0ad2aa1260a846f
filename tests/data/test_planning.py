"""Steps do not depend on ranks or accumulation, and a resumed loader continues with the next row."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from torch.utils.data import Dataset

from rlhf_lightning.data.planning import MicroBatch, PlannedLoader, StepPlan
from rlhf_lightning.ops.groups import token_budget

TOKENS = np.arange(1, 24) * 3 % 17 + 1


def steps(plan_of_rank: list[StepPlan]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for plan in plan_of_rank:
        for micro in plan:
            rows.setdefault(micro.step, []).extend(micro.rows)
    return {step: sorted(found) for step, found in rows.items()}


@pytest.mark.parametrize(("accumulate", "world_size"), [(8, 1), (1, 2), (2, 4), (1, 8)])
def test_a_step_has_the_same_rows_whoever_computes_it(accumulate: int, world_size: int) -> None:
    alone = steps([StepPlan(TOKENS, TOKENS, 8, seed=3)])
    shared = [StepPlan(TOKENS, TOKENS, 8, accumulate, rank, world_size, seed=3) for rank in range(world_size)]
    found = steps(shared)
    full = {step: rows for step, rows in found.items() if len(rows) == 8}
    assert full == {step: alone[step] for step in full}
    assert len(full) == 2
    assert len({len(list(plan)) for plan in shared}) == 1
    assert all(len(list(plan)) == len(plan) for plan in shared)


def test_weights_sum_to_a_mean_over_the_step() -> None:
    plans = [StepPlan(TOKENS, TOKENS * 2, 8, 2, rank, 2) for rank in range(2)]
    micros = [micro for plan in plans for micro in plan if micro.step == 0]
    tokens = sum((micro.per_token or 0) * sum(2 * TOKENS[row] for row in micro.rows) for micro in micros)
    groups = sum((micro.per_group or 0) * len(micro.rows) for micro in micros)
    assert len(micros) == 4
    assert tokens / 4 == pytest.approx(1.0)  # Lightning divides by accumulation, the strategy by ranks
    assert groups / 4 == pytest.approx(1.0)


def test_every_token_of_a_step_has_the_same_weight() -> None:
    """Microbatches of unequal counts: weights of their own would make the loss a mean of means."""
    counted = np.array([1, 2, 3, 4, 5, 60])
    micros = list(StepPlan(TOKENS[:6], counted, 6, accumulate=3))
    assert len({sum(counted[list(micro.rows)]) for micro in micros}) > 1
    assert {micro.per_token for micro in micros} == {3 / 75}  # Lightning divides by the 3 microbatches
    assert {micro.per_group for micro in micros} == {3 / 6}


def test_every_epoch_reads_every_row_once_in_another_order() -> None:
    plan = StepPlan(TOKENS, TOKENS, 5)
    first = [row for micro in plan for row in micro.rows]
    plan.epoch = 1
    second = [row for micro in plan for row in micro.rows]
    assert [micro.step for micro in plan] == list(range(plan.steps, 2 * plan.steps))  # they go on counting
    assert sorted(first) == sorted(second) == list(range(len(TOKENS)))
    assert first != second


def test_parts_are_balanced_and_never_empty() -> None:
    plan = StepPlan(np.array([100, 1, 1, 1, 1, 1]), np.ones(6), 6, accumulate=3)
    parts = [sorted(plan.tokens[list(micro.rows)].tolist()) for micro in plan]
    assert sorted(parts) == [[1, 1], [1, 1, 1], [100]]


class Rows(Dataset[tuple[int, ...]]):
    def __getitem__(self, micro: MicroBatch) -> tuple[int, ...]:  # type: ignore[override]
        return micro.rows


@pytest.mark.parametrize("kills", [[3], [1, 4], [2, 2, 2], [6]])
def test_resume_continues_with_the_next_row(kills: list[int]) -> None:
    whole = PlannedLoader(Rows(), StepPlan(TOKENS, TOKENS, 4, seed=1))
    expected = [*whole, *whole]
    assert expected[:6] != expected[6:]
    found, state = [], None
    for kill in [*kills, 99]:
        loader = PlannedLoader(Rows(), StepPlan(TOKENS, TOKENS, 4, seed=1))
        if state:
            loader.load_state_dict(state)
        for batch in chain(loader, loader, loader):
            if kill == 0 or len(found) == len(expected):
                break
            kill -= 1
            found.append(batch)
            state = loader.state_dict()
    assert found == expected


def test_token_budget_keeps_every_row_within_the_budget() -> None:
    batches = token_budget([5, 9, 2, 4, 30], 10)
    assert sorted(row for batch in batches for row in batch) == [0, 1, 2, 3, 4]
    assert [sum([5, 9, 2, 4, 30][row] for row in batch) for batch in batches] == [30, 9, 9, 2]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_a_limit_cuts_short_is_a_mean_over_the_rows_that_are_read(world_size: int) -> None:
    """Three of the microbatches of two steps of two: the second step has half its rows, with weights for them."""
    plans = [StepPlan(TOKENS, TOKENS, 8, 2, rank, world_size, seed=3, limit=3) for rank in range(world_size)]
    parts = [list(plan) for plan in plans]
    assert [len(part) for part in parts] == [3] * world_size
    assert plans[0].steps == 2
    whole = [list(StepPlan(TOKENS, TOKENS, 8, 2, rank, world_size, seed=3))[:2] for rank in range(world_size)]
    assert [part[:2] for part in parts] == whole
    last = [part[2] for part in parts]
    rows = [row for micro in last for row in micro.rows]
    assert {micro.per_group for micro in last} == {2 * world_size / len(rows)}
    assert last[0].per_token == pytest.approx(2 * world_size / TOKENS[rows].sum())


def test_a_limited_epoch_is_finished_where_the_limit_is() -> None:
    loader = PlannedLoader(Rows(), StepPlan(TOKENS, TOKENS, 4, seed=1, limit=0.5))
    assert loader.plan.batches == len(loader) // 2
    loader.load_state_dict({"epoch": 2, "taken": loader.plan.batches})
    assert (loader.plan.epoch, loader.plan.start) == (3, 0)
