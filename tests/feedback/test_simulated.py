"""Simulated annotators: what they are told to be is what their labels show, and mistakes are told in a line."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.data.comparisons import LabeledComparison
from rlhf_lightning.data.records import preference
from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.simulated import population, simulate
from rlhf_lightning.world import gold, group_value, rows
from rlhf_lightning.world.prompts import Prompt
from rlhf_lightning.world.prompts import candidates as of_prompt
from tests.helpers.cli import newest, rlhf

OPPOSED = {"cautious": 0.2, "curious": 0.8}


@cache
def candidates(count: int = 300) -> list[dict[str, Any]]:
    """Return prompts of the world with up to four different responses."""
    found = []
    for number, row in enumerate(rows("prompts", count)):
        prompt = Prompt(row["family"], row["prompt"], row["ideal"], row["answer"], tuple(row["others"]), row["claim"],
                        row["count"])  # fmt: skip
        rng = random.Random(number)
        texts = list(of_prompt(prompt, rng).values())
        found.append(row | {"responses": rng.sample(texts, min(4, len(texts))), "scores": [0.0] * len(texts)})
    return found


def labels(size: int = 2, share: int = 3, checks: float = 0.0, seed: int = 0, **people: Any) -> list[LabeledComparison]:
    annotators = population(**{"annotators": 10, "groups": {"balanced": 1}, "seed": seed} | people)
    return list(simulate(candidates(), annotators, labels=share, size=size, checks=checks, seed=seed))


def mistakes(found: list[LabeledComparison]) -> float:
    """Return the share of pairs whose worse response, by the gold reward, is preferred; ties left out."""
    wrong = []
    for label in found:
        first, second = (gold(label.comparison.metadata, text).total for text in label.comparison.responses)
        if first != second:
            wrong.append((first > second) == (label.ranking[0] > label.ranking[1]))
    return sum(wrong) / len(wrong)


def test_labels_are_rows_of_preferences_and_depend_on_the_seed_only() -> None:
    found = labels(checks=0.1)
    assert found == labels(checks=0.1)
    assert found != labels(checks=0.1, seed=1)
    row = json.loads(json.dumps(found[0].row()))
    assert {"id", "prompt", "responses", "ranking", "annotator", "group", "strength", "shown", "seconds"} <= row.keys()
    assert "scores" not in row  # of the sampled responses, in another order
    ranked = next(label for label in found if len(set(label.ranking)) == 2)
    best = ranked.comparison.responses[ranked.ranking.index(0)]
    assert preference(ranked.row()).responses[0] == best
    assert preference(ranked.row()).group == "balanced"
    ordinary = [label for label in found if label.check is None]
    shared: dict[str, set[str]] = {}
    for label in ordinary:
        shared.setdefault(label.comparison.id, set()).add(label.annotator)
    assert {len(names) for names in shared.values()} == {3}  # without replacement
    asked = [(label.comparison.id, label.annotator) for label in found]
    assert len(set(asked)) == len(asked)


def test_a_row_does_not_depend_on_those_before_it() -> None:
    annotators = population(4, {"balanced": 1})
    whole, part = (list(simulate(candidates()[first:], annotators, labels=2)) for first in (0, 100))
    assert [label for label in whole if label in part] == part


def test_without_noise_everybody_follows_gold() -> None:
    assert mistakes(labels()) == 0


def test_noise_is_the_share_of_flipped_pairs() -> None:
    assert mistakes(labels(noise=0.2)) == pytest.approx(0.2, abs=0.04)


def test_groups_have_their_shares_and_values() -> None:
    found = labels(groups=OPPOSED, ties=False)
    assert {label.annotator for label in found} == {
        *(f"cautious-{i}" for i in range(2)), *(f"curious-{i}" for i in range(8))
    }  # fmt: skip
    assert sum(label.group == "cautious" for label in found) / len(found) == pytest.approx(0.2, abs=0.05)
    for label in found:
        values = [group_value(label.comparison.metadata, y, str(label.group)) for y in label.comparison.responses]
        if round(values[0] - values[1], 6):
            assert label.ranking[0] == int(values[0] < values[1])


@pytest.mark.parametrize("bias", [-5.0, 5.0])
def test_position_bias_prefers_the_response_shown_first(bias: float) -> None:
    found = labels(position_bias=bias)
    first = [label.ranking[label.shown[0]] == 0 for label in found if label.shown]
    assert sum(first) / len(first) == (1.0 if bias > 0 else 0.0)
    assert {label.shown for label in found} == {(0, 1), (1, 0)}


def test_length_bias_prefers_the_longer() -> None:
    words = [([len(y.split()) for y in r.comparison.responses], r.ranking) for r in labels(length_bias=9.0)]
    longer = [ranking[0] == int(a < b) for (a, b), ranking in words if abs(a - b) > 3]
    assert len(longer) > 100
    assert all(longer)


def test_checks_are_passed_by_who_looks() -> None:
    found = labels(checks=0.3, careless=0.3, groups=OPPOSED)
    checked = [label for label in found if label.check is not None]
    assert 0.1 < len(checked) / len(found) < 0.3  # besides the others, none twice
    passed: dict[str, list[bool]] = {}
    for label in checked:
        passed.setdefault(label.annotator, []).append(label.ranking[label.check or 0] == 0)
    rates = {name: sum(right) / len(right) for name, right in passed.items()}
    assert sorted(rate == 1.0 for rate in rates.values()) == [False] * 3 + [True] * 7
    quick = {name for name, rate in rates.items() if rate < 1}
    seconds = {
        who: sum(r.seconds or 0 for r in found if (r.annotator in quick) is who)
        / sum((r.annotator in quick) is who for r in found)
        for who in (True, False)
    }
    assert seconds[True] < seconds[False]


def test_rankings_and_ties() -> None:
    found = labels(size=3, groups={"curious": 1})
    assert found
    for label in found:
        values = [round(group_value(label.comparison.metadata, y, "curious"), 6) for y in label.comparison.responses]
        levels = sorted(set(values), reverse=True)
        assert [levels.index(value) for value in values] == list(label.ranking)
        assert label.strength is None
    assert any(len(set(label.ranking)) < 3 for label in found)
    assert all(len(set(label.ranking)) == 3 for label in labels(size=3, ties=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": {"cautius": 1}}, "simulate.groups: 'cautius' is not one of .* Did you mean 'cautious'"),
        ({"annotators": 2, "groups": {"cautious": 0.1, "curious": 0.9}}, "simulate.groups.cautious: 0.1 of 2 annot"),
        ({"annotators": 2}, "simulate.labels=3 of each comparison need as many annotators, not 2"),
        ({"noise": 1.5}, r"simulate.noise=1.5 is not a finite number in \[0, 1\]"),
        ({"size": 9}, "no row has 9 distinct responses"),
        ({"size": 1}, r"simulate.size=1 is not a whole number in \[2, 9\]"),
    ],
)
def test_settings_that_cannot_be_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        labels(**options)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "responses": ["a", "b"]}, "row 1 is no row of the built-in world .it has no family, ideal"),
        (next(rows("prompts", 1)), "row 1 has no list of responses to compare; sample some with stage=candidates"),
    ],
)
def test_only_candidates_of_the_world_can_be_labeled(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(simulate([row], population(3, {"balanced": 1})))


@pytest.mark.slow
def test_the_stage_writes_labels_and_says_what_is_wrong(tmp_path: Path) -> None:
    lines = [json.dumps(row | {"prompt": [{"role": "user", "content": row["prompt"]}]}) for row in candidates()]
    (tmp_path / "candidates.jsonl").write_text("\n".join(lines))
    done = rlhf(
        tmp_path, "stage=simulate", "data.train=candidates.jsonl", "simulate.groups={cautious:1,curious:4}",
        "simulate.checks=0.1",
    )  # fmt: skip
    run = newest(tmp_path, "simulate")
    written = [json.loads(line) for line in (run / "labels.jsonl").read_text().splitlines()]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["labels"] == len(written)
    assert metrics["cautious/annotators"] == 2
    assert metrics["curious/checks_passed"] > 0.7
    assert 0.3 < metrics["agreement"] < 0.95
    assert "curious" in done.stdout
    (tmp_path / "plain.jsonl").write_text(json.dumps({"prompt": "Hi", "responses": ["a", "b"]}) + "\n")
    failed = rlhf(tmp_path, "stage=simulate", "data.train=plain.jsonl", code=2)
    assert "plain.jsonl, row 1 is no row of the built-in world" in failed.stderr
