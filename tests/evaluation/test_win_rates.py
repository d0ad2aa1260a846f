"""Win rates by hand, and the win rate at equal length on planted data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.policy import Evaluation
from rlhf_lightning.evaluation.win_rates import (
    Duel,
    by_scores,
    difficulty,
    length_controlled,
    opponents,
    prompt_key,
    rows_of,
)
from rlhf_lightning.ops.bootstrap import bootstrap_interval, bootstrap_weights
from rlhf_lightning.ops.statistics import share_interval, wilson_interval

PLACES = [(0, 0), (0, 1), (1, 0), (2, 0)]


def answered(columns: dict[str, Any], texts: str = "abcd", places: Any = PLACES) -> Evaluation:
    """Return an evaluation of four responses to three prompts, whose clusters of tokens say nothing."""
    samples = [{"prompt": f"p{row}", "response": text * 3} for (row, _), text in zip(places, texts, strict=True)]
    return Evaluation(columns, places, [(0,)] * len(places), samples)


def test_scores_decide_and_equal_ones_are_ties() -> None:
    models = {
        "a": answered({"reward": [1.0, 2.0, 3.0, 0.0], "gold": [0.0, None, 0.0, 0.0]}),
        "b": answered({"reward": [0.0, 2.0, 4.0, -1.0], "gold": [1.0, 1.0, 0.0, None]}),
    }
    gold_missing = {name: answered({"length": [1.0] * 4}) for name in "ab"}
    reward, gold = by_scores(models, [("b", "a")])
    assert (reward.by, reward.name, reward.outcomes) == ("reward", "b-a", [0.0, 0.5, 1.0, 0.0])
    assert (gold.by, gold.outcomes) == ("gold", [1.0, 0.5])
    assert by_scores(gold_missing, [("b", "a")]) == []
    table = reward.intervals()
    keys = [prompt_key(models["a"], place) for place in range(4)]
    assert keys[0] == keys[1] != keys[2]
    assert [table[name][0] for name in ("wins", "ties", "losses")] == [1, 1, 2]
    assert table["win_rate"] == share_interval([0.0, 0.5, 1.0, 0.0], keys)
    assert table["win_rate"][0] == 1.5 / 4
    assert table["bootstrap"][0] == 1.5 / 4


def test_pairs_are_of_the_same_row_and_generation() -> None:
    ours = answered({"gold": [1.0, 2.0, 3.0, 4.0]})
    theirs = answered({"gold": [9.0, 0.0, 9.0]}, "xyz", [(2, 0), (0, 1), (3, 0)])
    (found,) = by_scores({"a": ours, "b": theirs}, [("a", "b")])
    assert found.outcomes == [1.0, 0.0]  # (0, 1) and (2, 0)
    assert found.prompts == [prompt_key(ours, 1), prompt_key(ours, 3)]


def test_a_row_of_the_table() -> None:
    duel = Duel("b", "a", "judge", [1.0, 0.5, 0.0, 1.0], range(4), [(10, 5), (3, 3), (1, 4), (6, 8)],
                {"failed": (2.0, math.nan, math.nan), "flips": (0.5, 0.1, 0.9)})  # fmt: skip
    (row,) = rows_of([duel], [duel.intervals()])
    assert {k: row[k] for k in ("model", "opponent", "by", "count", "wins", "ties", "losses", "failed")} == {
        "model": "b", "opponent": "a", "by": "judge", "count": 4, "wins": 2, "ties": 1, "losses": 1, "failed": 2,
    }  # fmt: skip
    assert (row["win_rate"], row["low"], row["high"]) == (0.625, *wilson_interval(2.5, 4))
    assert row["bootstrap_low"] < 0.625 < row["bootstrap_high"]
    assert row["length_controlled_low"] < row["length_controlled"] < row["length_controlled_high"]
    assert (row["flips"], row["flips_low"], row["flips_high"]) == (0.5, 0.1, 0.9)
    assert (row["characters"], row["opponent_characters"]) == (5.0, 5.0)
    (empty,) = rows_of([none := Duel("b", "a", "judge", [], [], [])], [none.intervals()])
    assert (empty["count"], empty["wins"], empty["characters"], "win_rate" in empty) == (0, 0, None, False)


def test_a_model_that_always_wins_has_no_interval_by_bootstrap() -> None:
    table = Duel("b", "a", "gold", [1.0] * 30, range(30), [(1, 1)] * 30).intervals()
    assert table["win_rate"] == (1.0, *wilson_interval(30, 30))
    assert math.isnan(table["bootstrap"][1])
    assert table["length_controlled"][0] > 0.99
    assert math.isnan(table["length_controlled"][1])
    (row,) = rows_of([Duel("b", "a", "gold", [1.0], [0], [(1, 1)])], [table])
    assert row["bootstrap_low"] is None


def test_every_two_models_or_each_against_one() -> None:
    names = ["sft", "base", "ppo"]
    assert opponents(names, "base") == [("sft", "base"), ("ppo", "base"), ("ppo", "sft")]
    assert opponents(names, "sft") == [("base", "sft"), ("ppo", "sft"), ("ppo", "base")]
    assert opponents(names, "sft", "ppo") == [("sft", "ppo"), ("base", "ppo")]
    with pytest.raises(UserError, match=r"evaluate.against=bass is none of sft, base, ppo. Did you mean 'base'"):
        opponents(names, "sft", "bass")
    with pytest.raises(UserError, match="evaluate.against=sft: there is no other model"):
        opponents(["sft"], "sft", "sft")


def planted(seed: int, count: int, theta: float, phi: float, longer: float, psi: float = 0.0) -> Any:
    """Return outcomes, lengths and difficulties by the model itself; `longer` moves the mean length."""
    rng = np.random.default_rng(seed)
    lengths = np.stack([rng.normal(600 + longer, 150, count), rng.normal(600, 150, count)], 1).round()
    gaps, gamma = lengths[:, 0] - lengths[:, 1], rng.uniform(0, 1, count)
    odds = theta + phi * np.tanh(gaps / gaps.std(ddof=1)) + psi * (gamma - gamma.mean())
    outcomes = (rng.random(count) < expit(odds)).astype(float)
    truth = expit(theta + psi * (gamma - gamma.mean())).mean()
    return outcomes, [(int(a), int(b)) for a, b in lengths], gamma, truth


def controlled(outcomes: np.ndarray, lengths: Any, gamma: Any) -> float:
    return float(length_controlled(outcomes, lengths, gamma, np.ones((1, len(outcomes))))[0])


@pytest.mark.slow
def test_known_coefficients_are_recovered() -> None:
    """Of many pairs the prediction at equal length is the true one, with a difficulty of prompts or without."""
    for theta, phi, psi in ((0.0, 1.5, 0.0), (0.7, 1.5, 2.0), (-0.5, -1.0, 3.0)):
        outcomes, lengths, gamma, truth = planted(0, 40_000, theta, phi, 100.0, psi)
        assert controlled(outcomes, lengths, gamma) == pytest.approx(truth, abs=0.01)


@pytest.mark.slow
def test_a_model_that_wins_only_by_length_does_not_win_at_equal_length() -> None:
    """Verbose against concise: the raw rate rewards length, the controlled one does not; a better model keeps its."""
    raw, fair, better, concise = [], [], [], []
    for seed in range(20):
        outcomes, lengths, _, _ = planted(seed, 500, 0.0, 1.5, 150.0)
        raw.append(outcomes.mean())
        fair.append(controlled(outcomes, lengths, [0.5] * 500))
        mirrored = controlled(1 - outcomes, [(b, a) for a, b in lengths], [0.5] * 500)
        assert mirrored == pytest.approx(1 - fair[-1], abs=1e-6)  # the opponent's is the rest
        outcomes, lengths, _, truth = planted(seed, 500, 1.0, 1.5, 0.0)
        better.append(controlled(outcomes, lengths, [0.5] * 500) - truth)
        outcomes, lengths, _, truth = planted(seed, 500, 1.0, 1.5, -150.0)
        concise.append((outcomes.mean(), controlled(outcomes, lengths, [0.5] * 500)))
    assert np.mean(raw) > 0.62
    assert np.mean(fair) == pytest.approx(0.5, abs=0.02)
    assert np.mean(better) == pytest.approx(0.0, abs=0.02)
    assert np.mean([before for before, _ in concise]) < 0.63
    assert np.mean([after for _, after in concise]) == pytest.approx(expit(1.0), abs=0.03)


def test_the_scale_of_length_does_not_matter() -> None:
    outcomes, lengths, gamma, _ = planted(1, 200, 0.5, 1.0, 100.0)
    tenfold = [(10 * a + 7, 10 * b + 7) for a, b in lengths]
    assert controlled(outcomes, tenfold, gamma) == pytest.approx(controlled(outcomes, lengths, gamma))
    equal = [(5, 5)] * 200
    assert controlled(outcomes, equal, [0.5] * 200) == pytest.approx(outcomes.mean(), abs=1e-3)
    assert controlled(outcomes, lengths, gamma) != pytest.approx(outcomes.mean(), abs=0.02)


def test_prompts_are_as_difficult_as_others_find_them() -> None:
    """How often other models beat the same opponent, in whatever order they are compared; not the model itself."""
    sides = [(1, 1)] * 2
    mine = Duel("b", "a", "gold", [1.0, 1.0], ["p", "q"], sides)
    duels = [
        mine,
        Duel("c", "a", "gold", [1.0, 0.0], ["p", "q"], sides),
        Duel("a", "d", "gold", [0.5, 1.0], ["p", "q"], sides),  # d beats a with 0.5 and 0
        Duel("c", "a", "judge", [0.0, 1.0], ["p", "q"], sides),
        Duel("d", "c", "gold", [0.0, 1.0], ["p", "q"], sides),
    ]
    assert difficulty(mine, duels) == [0.75, 0.0]
    assert difficulty(mine, [mine]) == [0.5, 0.5]
    assert difficulty(Duel("b", "a", "gold", [1.0], ["r"], [(1, 1)]), duels) == [(1 + 0 + 0.5 + 0) / 4]


@pytest.mark.slow
@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.nightly)])
def test_the_interval_at_equal_length_covers(count: int) -> None:
    """The true rate lies in at least 93% of 95% intervals, of clusters of two pairs, and not in all of them."""
    hits, trials = 0, 300
    for seed in range(trials):
        outcomes, lengths, _, truth = planted(seed, count, 0.5, 1.5, 100.0)
        outcomes, lengths = np.repeat(outcomes, 2), [pair for pair in lengths for _ in range(2)]
        duel = Duel("b", "a", "gold", list(outcomes), [i // 2 for i in range(2 * count)], lengths)
        _, low, high = duel.intervals(seed=seed)["length_controlled"]
        hits += low <= truth <= high
    assert 0.93 * trials <= hits < 0.99 * trials


@pytest.mark.slow
def test_the_bootstrap_of_a_win_rate_covers() -> None:
    """Responses to one prompt agree: per-prompt chances of Beta(1, 1), four pairs each."""
    rng, hits, trials, prompts = np.random.default_rng(0), 0, 500, 30
    clusters = [i // 4 for i in range(4 * prompts)]
    for seed in range(trials):
        outcomes = (rng.random(4 * prompts) < np.repeat(rng.random(prompts), 4)).astype(float)
        weights = bootstrap_weights(clusters, seed, 200)
        _, low, high = bootstrap_interval(weights @ outcomes / weights.sum(1), prompts, share=True)
        hits += low <= 0.5 <= high
    assert 0.93 * trials <= hits <= 0.975 * trials
