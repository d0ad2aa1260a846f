"""Learning-rate schedules: warmup, quarter points and the end, as the optimizer sees them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.modules.schedules import schedule

PEAK = 0.5
COSINE = [1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0.0]  # (1 + cos(pi x)) / 2 at quarter points


def rates(updates: int, total_steps: int | None, **options: Any) -> list[float]:
    """Return the rate of each of `updates` updates as a share of the peak."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    made = schedule(optimizer, total_steps, **options)
    seen = []
    for _ in range(updates):
        seen.append(optimizer.param_groups[0]["lr"] / PEAK)
        optimizer.step()
        made.step()
    return seen


@pytest.mark.parametrize("warmup", [3, 0.15])
@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_warmup_starts_above_zero_and_ends_before_the_peak(shape: str, warmup: float) -> None:
    """Three updates of 20: 1/4, 2/4, 3/4, and the fourth has the peak."""
    assert rates(4, 20, shape=shape, warmup=warmup) == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize(
    ("shape", "rest"), [("constant", [1.0] * 5), ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]), ("cosine", COSINE)]
)
@pytest.mark.parametrize("final", [0.0, 0.2])
def test_quarter_points_of_the_decay(shape: str, rest: list[float], warmup: int, final: float) -> None:
    """The decay is counted from the end of warmup to the last update, and then stays where it is."""
    seen = rates(warmup + 12, warmup + 8, shape=shape, warmup=warmup, final=final)[warmup:]
    assert seen[:9:2] == pytest.approx([final + (1 - final) * x for x in rest])
    assert seen[9:] == pytest.approx([seen[8]] * 3)


@pytest.mark.parametrize(("warmup", "updates"), [(0.0, 0), (0.5, 5), (0.19, 1), (1, 1), (4, 4)])
def test_warmup_is_a_share_below_one_and_a_number_of_updates_from_one(warmup: float, updates: int) -> None:
    seen = rates(10, 10, shape="constant", warmup=warmup)
    assert seen == pytest.approx([(t + 1) / (updates + 1) for t in range(updates)] + [1.0] * (10 - updates))


def test_the_default_is_a_cosine_to_a_tenth_of_the_peak() -> None:
    assert rates(9, 8)[::2] == pytest.approx([0.1 + 0.9 * x for x in COSINE])


def test_a_run_that_is_all_warmup_or_has_no_update_has_a_rate() -> None:
    assert rates(3, 2, shape="linear", warmup=2, final=0.1) == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates(2, 0, shape="linear", final=0.1) == pytest.approx([1.0, 0.1])


def test_unknown_shape_is_refused() -> None:
    with pytest.raises(UserError, match=r"schedule\.shape='poly' is not one of constant, linear, cosine"):
        rates(1, 1, shape="poly")


def test_wsd_is_constant_and_then_falls_linearly_over_the_last_steps() -> None:
    seen = rates(11, 10, shape="wsd", warmup=2, decay=0.4, final=0.2)
    assert seen == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    with pytest.raises(UserError, match=r"schedule\.warmup=8 and schedule\.decay=0\.4 are more than the 10 updates"):
        rates(1, 10, shape="wsd", warmup=8, decay=0.4)


def test_without_a_number_of_updates_only_a_constant_rate_can_be_planned() -> None:
    assert rates(3, None, shape="constant", warmup=1) == pytest.approx([0.5, 1, 1])
    for options in ({"shape": "cosine"}, {"shape": "wsd"}, {"shape": "constant", "warmup": 0.1}):
        with pytest.raises(UserError, match="needs the number of updates of the run"):
            rates(1, None, **options)
