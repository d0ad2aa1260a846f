"""The scripted judge of the world: its errors and its position bias are what it is told, by seed and content only."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.data.comparisons import Comparison
from rlhf_lightning.data.messages import turn
from rlhf_lightning.errors import UserError
from rlhf_lightning.judges.constitution import Conflict, Constitution, load_constitution
from rlhf_lightning.judges.table import load_judge
from rlhf_lightning.judges.world import WorldJudge, check_known, violates
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.world import gold, rows
from rlhf_lightning.world.prompts import Prompt, candidates, declared
from tests.helpers.cli import newest, rlhf


def of(row: dict[str, Any]) -> Prompt:
    return Prompt(
        row["family"],
        row["prompt"],
        row["ideal"],
        row["answer"],
        tuple(row["others"]),
        row["claim"],
        row["count"],
    )


@cache
def pairs(size: int = 2, count: int = 250) -> list[Comparison]:
    """Return comparisons whose responses differ in gold reward."""
    found = []
    for number, row in enumerate(rows("prompts", count)):
        texts = list(candidates(of(row), random.Random(number)).values())
        random.Random(number).shuffle(texts)
        texts = list({gold(row, text).total: text for text in texts}.values())[:size]
        if len(texts) == size:
            found.append(Comparison(f"{number}", [turn("user", row["prompt"])], tuple(texts), row))
    return found


def totals(comparison: Comparison) -> list[float]:
    return [gold(comparison.metadata, text).total for text in comparison.responses]


def wrong(judge: WorldJudge, by: int | None = None) -> float:
    """Return the share of pairs judged against gold; of the forward (0) or swapped (1) order, or of both."""
    asked = pairs()
    mistakes = []
    for place, verdict in judge.compare(asked):
        value = verdict.probability if by is None else verdict.orders[by]
        first, second = totals(asked[place])
        assert value is not None
        mistakes.append((value > 0.5) != (first > second))
    return sum(mistakes) / len(mistakes)


def test_without_errors_it_follows_gold_in_both_orders() -> None:
    judge = WorldJudge()
    assert wrong(judge) == wrong(judge, 0) == wrong(judge, 1) == 0


@pytest.mark.parametrize("rate", [0.1, 0.4, 1.0])
def test_it_is_wrong_about_its_share_of_pairs_and_both_orders_agree(rate: float) -> None:
    judge = WorldJudge(error_rate=rate)
    deviation = (rate * (1 - rate) / len(pairs())) ** 0.5
    assert abs(wrong(judge) - rate) <= 3.5 * deviation
    assert wrong(judge, 0) == wrong(judge, 1) == wrong(judge)  # wrong about the pair, not about the order


def test_a_verdict_depends_on_the_seed_and_the_texts_and_not_on_the_order_or_the_others() -> None:
    asked, judge = pairs(), WorldJudge(error_rate=0.3)
    given = {place: verdict.probability for place, verdict in judge.compare(asked)}
    other = WorldJudge(error_rate=0.3, seed=1)
    assert given != {place: verdict.probability for place, verdict in other.compare(asked)}
    swapped = [Comparison("other", c.prompt, c.responses[::-1], c.metadata) for c in asked]
    assert {place: 1 - (v.probability or 0.0) for place, v in judge.compare(swapped)} == given
    assert [v.probability for _, v in judge.compare(asked[40:50])] == [given[place] for place in range(40, 50)]


def test_the_response_shown_first_gains_the_bias_and_both_orders_make_it_a_tie() -> None:
    asked, judge = pairs(), WorldJudge(position_bias=0.6)
    for place, verdict in judge.compare(asked):
        first, second = totals(asked[place])
        gap = first - second
        if abs(gap) < 0.59:
            assert verdict.orders == (1.0, 0.0)  # whoever is shown first
            assert verdict.probability == 0.5
        elif abs(gap) > 0.61:
            assert verdict.probability == float(gap > 0)
    assert sum(v.probability == 0.5 for _, v in judge.compare(asked)) > 3


def test_equal_responses_tie() -> None:
    row = next(rows("prompts", 1))
    equal = Comparison("0", [turn("user", row["prompt"])], (row["ideal"], row["ideal"]), row)
    assert [v.probability for _, v in WorldJudge(error_rate=1.0).compare([equal])] == [0.5]


def test_rankings_and_ratings_have_the_same_values() -> None:
    asked = pairs(3, 150)
    assert asked
    for (place, ranking), (_, ratings) in zip(WorldJudge().rank(asked), WorldJudge().rate(asked), strict=True):
        values = totals(asked[place])
        order = sorted(values, reverse=True)
        assert ranking.ranks == tuple(order.index(value) for value in values)
        assert [rating.value for rating in ratings] == values
    signs = [
        rating.value == -value
        for place, ratings in WorldJudge(error_rate=0.2).rate(asked)
        for rating, value in zip(ratings, totals(asked[place]), strict=True)
    ]
    assert abs(sum(signs) / len(signs) - 0.2) <= 3.5 * (0.16 / len(signs)) ** 0.5


def test_a_principle_comes_before_the_gold_reward() -> None:
    asked = pairs()
    constitution = load_constitution("world")
    judge, names = WorldJudge(constitution="world"), set()
    for place, verdict in judge.compare(asked):
        names.add(verdict.principle)
        bad = [
            violates(verdict.principle, constitution, asked[place].metadata, text) for text in asked[place].responses
        ]
        first, second = totals(asked[place])
        assert verdict.probability == float(bad[0] < bad[1] if bad[0] != bad[1] else first > second)
    assert names == {"harmless", "helpful", "honest", "concise"}


def row_of(family: str) -> dict[str, Any]:
    return next(row for row in rows("prompts", 1000) if row["family"] == family)


REFUSAL = declared()["refusals"][1]


@pytest.mark.parametrize(
    ("principle", "family", "response", "expected"),
    [
        ("harmless", "harmful", "Sure. You need a plan.", True),
        ("harmless", "harmful", REFUSAL, False),
        ("harmless", "lookalike", "ideal", False),
        ("helpful", "lookalike", REFUSAL, True),
        ("helpful", "lookalike", "ideal", False),
        ("helpful", "harmful", REFUSAL, False),
        ("helpful", "arithmetic", "It is 99.", True),
        ("honest", "fact", "The capital is Nowhere.", True),
        ("honest", "fact", REFUSAL, False),
        ("honest", "arithmetic", "It is 99.", False),
        ("concise", "fact", "ideal That is a very good question. There are many things to say about this.", True),
        ("concise", "fact", "Nowhere.", False),
    ],
)
def test_what_principles_say(principle: str, family: str, response: str, expected: bool) -> None:
    row = row_of(family)
    assert violates(principle, load_constitution("world"), row, response.replace("ideal", row["ideal"])) == expected


def test_without_rules_for_conflicts_principles_go_too_far() -> None:
    world = load_constitution("world")
    none = Constitution(world.principles)
    assert violates("harmless", none, row_of("lookalike"), row_of("lookalike")["ideal"])
    assert not violates("harmless", none, row_of("lookalike"), REFUSAL)
    assert violates("helpful", none, row_of("harmful"), REFUSAL)


def test_mistakes_are_told_in_a_line() -> None:
    with pytest.raises(UserError, match=r"judge\.error_rate=2 is not a finite number in \[0, 1\]"):
        WorldJudge(error_rate=2)
    with pytest.raises(UserError, match="judge.position_bias"):
        WorldJudge(position_bias=float("nan"))
    with pytest.raises(UserError, match=r"judge\.constitution: the built-in world has no principle 'no-serious-harm'"):
        WorldJudge(constitution="default")
    world = load_constitution("world")
    other = Constitution(world.principles, (Conflict("high-risks", "Decline."),))
    with pytest.raises(
        UserError, match=r"no conflict rule 'high-risks'; it knows high-risk, looks-harmful\. Did you mean"
    ):
        check_known(other, "judge.constitution")
    row = row_of("fact")
    bad = {
        "it has no answer": {k: v for k, v in row.items() if k != "answer"},
        "its family is 'facts', not one of fact": row | {"family": "facts"},
        "its others is 'all'": row | {"others": "all"},
        "its others are no texts": row | {"others": [["x"]]},
    }
    for problem, metadata in bad.items():
        with pytest.raises(UserError) as error:
            list(WorldJudge().compare([Comparison("c-7", [turn("user", "hi")], ("a", "b"), metadata)]))
        assert str(error.value).startswith(f"comparison c-7 is no row of the built-in world ({problem}")
        assert "\n" not in str(error.value)


def test_it_is_chosen_by_name() -> None:
    judge = load_judge(
        {
            "kind": "world",
            "error_rate": 0.25,
            "position_bias": 0.0,
            "constitution": None,
            "name": "world",
            "seed": 3,
            "mode": "pairwise",
        }
    )
    assert isinstance(judge, WorldJudge)
    assert (judge.error_rate, judge.seed, judge.name) == (0.25, 3, "world")


@pytest.mark.slow
@pytest.mark.xdist_group("judge_world")
def test_as_a_stage_and_as_a_reward(tmp_path: Path) -> None:
    """Its labels and its scores go by the gold reward; rows of others are told in a line."""
    row = {"prompt": "Say hello.", "responses": ["Hello!", "No."]}
    asked = [{**c.metadata, "responses": list(c.responses)} for c in pairs()[:12]]
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "world.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    build_tiny(tmp_path / "model", ["What is the capital?"], vocab_size=270, hidden_size=16, layers=1, heads=2)
    rlhf(tmp_path, "stage=judge", "judge=world", "data.train=world.jsonl")
    labels = [json.loads(line) for line in (newest(tmp_path, "judge") / "labels.jsonl").read_text().splitlines()]
    assert len(labels) == 12
    for label in labels:
        first, second = (gold(label, text).total for text in label["responses"])
        assert label["ranking"] == ([0, 1] if first > second else [1, 0])
    rlhf(tmp_path, "stage=candidates", "init_from=model", "data.train=world.jsonl", "data.template=plain",
         "reward_from=judge:world", "candidates.num_generations=0")  # fmt: skip
    scored = [
        json.loads(line) for line in (newest(tmp_path, "candidates") / "candidates.jsonl").read_text().splitlines()
    ]
    for row, given in zip(scored, asked, strict=True):
        assert row["scores"] == pytest.approx([gold(given, text).total for text in row["responses"]])
    done = rlhf(tmp_path, "stage=judge", "judge=world", "data.train=mine.jsonl", code=2)
    assert "is no row of the built-in world (it has no family, ideal, answer, others, claim, count)" in done.stderr
    assert "Traceback" not in done.stderr
    done = rlhf(tmp_path, "stage=judge", "judge=world", "judge.error_rate=1.5", "data.train=world.jsonl", code=2)
    assert "judge.error_rate=1.5 is not a finite number in [0, 1]" in done.stderr
