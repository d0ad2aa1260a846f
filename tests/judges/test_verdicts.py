"""What counts as a verdict in what a judge writes, and what is a recorded failure."""

from __future__ import annotations

import pytest

from rlhf_lightning.judges.judge import REFUSAL, UNREADABLE
from rlhf_lightning.judges.verdicts import read_pair, read_ranking, read_rating


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[[A]]", 1.0), ("B", 0.0), ("b", None), (" A.", 1.0), ("**B**", 0.0), ("Response A", 1.0), ("Answer: B", 0.0),
        ("Tie", 0.5), ("[[C]]", 0.5), ("[[tie]]", 0.5), ("[[Response B]]", 0.0), ("Final verdict: [[ a ]]", 1.0),
        ("The second is rude.\n\nB", 0.0), ("A: it is kinder", 1.0), ("B) because", 0.0),
        ("Response A says [[B]] to sway me. My verdict is [[A]]", 1.0),  # the last one counts
        ("I think that response B is better.", 0.0),
        ("Response A is better, or response B is better.", None),
        ("A good answer would say more.", None),  # an article is no verdict
        ("A and B are both fine.", None), ("", None), ("AB", None), ("[[D]]", None), ("42", None), ("\u202eA B", None),
        ("I'm sorry, but I cannot compare these.", REFUSAL), ("I can’t help with that.", REFUSAL),
        ("As an AI, I have no opinion.", REFUSAL),
        ("I'm sorry to say that A is worse. [[B]]", 0.0),  # a verdict comes first
    ],
)  # fmt: skip
def test_pairs(text: str, value: float | str | None) -> None:
    expected = (value, None) if isinstance(value, float) else (None, value or UNREADABLE)
    assert read_pair(text) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4.0), ("[[5]]", 5.0), ("Rating: 3", 3.0), ("It is fine.\n\n4/5", 4.0), ("[[3.5]]", 3.5), ("Score: 2.", 2.0),
        ("[[1]] no, [[2]]", 2.0), ("0", None), ("[[6]]", None), ("1. The response is short", None), ("four", None),
        ("45", None), ("I won't rate this.", REFUSAL),
    ],
)  # fmt: skip
def test_ratings(text: str, value: float | str | None) -> None:
    expected = (value, None) if isinstance(value, float) else (None, value or UNREADABLE)
    assert read_rating(text, 5) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[[B > A > C]]", (1, 0, 2)), ("A > C > B", (0, 2, 1)), ("[[B = C > A]]", (1, 0, 0)), ("[[A=B=C]]", (0, 0, 0)),
        ("First [[A > B > C]], no: [[C > B > A]]", (2, 1, 0)), ("[[Response C > Response A > Response B]]", (1, 2, 0)),
        ("[[B > A]]", None), ("[[A > A > B]]", None), ("[[A > B > C > D]]", None), ("B, A, C", None),
    ],
)  # fmt: skip
def test_rankings(text: str, value: tuple[int, ...] | None) -> None:
    assert read_ranking(text, "ABC") == ((value, None) if value else (None, UNREADABLE))
