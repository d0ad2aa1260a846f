"""Rewards that compare: the win rate of each response, which pairs are asked, and what a judge may not return."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.pairwise import WinRate, compares


class Judge:
    """Prefers the response of the larger number by sigma of the difference."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[str, str], Any]] = []

    def compare(self, prompts: Any, pairs: Any, metadata: Any) -> torch.Tensor:
        self.asked += zip(prompts, pairs, metadata, strict=True)
        return torch.tensor([float(a) - float(b) for a, b in pairs]).sigmoid()


def test_the_mean_probability_of_winning() -> None:
    judge = Judge()
    scores = WinRate(judge, 3)(["p"] * 3 + ["q"] * 3, ["0", "1", "2", "3", "3", "5"], [{"i": i} for i in range(6)])
    s = torch.tensor([1.0, 2.0]).sigmoid().tolist()  # of differences of 1 and 2
    expected = [(2 - s[0] - s[1]) / 2, 0.5, (s[0] + s[1]) / 2, (1.5 - s[1]) / 2, (1.5 - s[1]) / 2, s[1]]
    assert scores.tolist() == pytest.approx(expected)
    assert judge.asked == [
        ("p", ("0", "1"), {"i": 0}), ("p", ("0", "2"), {"i": 0}), ("p", ("1", "2"), {"i": 1}),
        ("q", ("3", "5"), {"i": 3}), ("q", ("3", "5"), {"i": 4}),  # equal texts are not compared
    ]  # fmt: skip


def test_equal_texts_are_no_reason_to_ask() -> None:
    class Silent:
        def compare(self, *_: Any) -> Any:
            raise AssertionError

    assert WinRate(Silent(), 2)(["p"] * 2, ["same", "same "], [{}, {}]).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("returned", [[0.5], [0.5, 1.5], [0.5, float("inf")], [[0.5], [0.5]]])
def test_a_judge_returns_probabilities(returned: Any) -> None:
    class Wrong:
        def compare(self, *_: Any) -> Any:
            return returned

    with pytest.raises(UserError, match="for 2 pairs; one probability each is needed"):
        WinRate(Wrong(), 2)(["p"] * 4, ["a", "b", "c", "d"], [{}] * 4)


def test_no_verdict_is_no_preference(caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        def compare(self, *_: Any) -> torch.Tensor:
            return torch.tensor([float("nan"), 1.0])

    assert WinRate(Failing(), 2)(["p"] * 4, ["a", "b", "c", "d"], [{}] * 4).tolist() == [0.5, 0.5, 1.0, 0.0]
    assert "no verdict on 1 of 2 pairs" in caplog.text


def test_what_compares() -> None:
    assert compares(Judge())
    assert not compares(lambda p, r, m: r)
