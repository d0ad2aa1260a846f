"""Bradley-Terry ratings against closed forms, statsmodels and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.special import expit

from rlhf_lightning.evaluation.ratings import SCALE, bradley_terry
from rlhf_lightning.evaluation.win_rates import Duel


def duel(model: str, opponent: str, wins: float, losses: float, ties: int = 0) -> Duel:
    outcomes = [1.0] * int(wins) + [0.0] * int(losses) + [0.5] * ties
    return Duel(model, opponent, "gold", outcomes, range(len(outcomes)), [(1, 1)] * len(outcomes))


def test_of_two_models_it_is_the_log_odds_and_400_points_are_ten_to_one() -> None:
    ratings, reason = bradley_terry([duel("b", "a", 75, 25)])
    assert reason is None
    assert ratings["b"][0] - ratings["a"][0] == pytest.approx(400 * math.log10(3))
    assert ratings["b"][0] + ratings["a"][0] == pytest.approx(2000)
    ratings, _ = bradley_terry([duel("b", "a", 10, 1)])
    assert ratings["b"][0] - ratings["a"][0] == pytest.approx(400)
    ratings, _ = bradley_terry([duel("b", "a", 70, 20, ties=10)])  # a tie is half a win
    assert ratings["b"][0] - ratings["a"][0] == pytest.approx(400 * math.log10(3))


def test_games_of_consistent_strength_give_it_back() -> None:
    """Where every win share is that of the model, the maximum is at the strengths, whatever was compared how often."""
    strengths = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 8.0}
    duels = [
        duel(j, i, n * strengths[j], n * strengths[i])
        for n, (i, j) in zip((3, 1, 5, 2, 1), [*itertools.combinations("abc", 2), ("c", "d"), ("a", "d")], strict=True)
    ]
    ratings, _ = bradley_terry(duels)
    mean = sum(math.log(s) for s in strengths.values()) / 4
    for name, strength in strengths.items():
        assert ratings[name][0] == pytest.approx(1000 + SCALE * (math.log(strength) - mean), abs=1e-4)
    again, _ = bradley_terry(duels[::-1])
    assert {name: row[0] for name, row in again.items()} == pytest.approx({n: r[0] for n, r in ratings.items()})


def test_the_estimate_is_where_the_expected_wins_are_the_wins() -> None:
    """The score equations of the likelihood: of each model the wins are those that its strength expects."""
    duels = [duel("b", "a", 7, 3), duel("c", "a", 2, 8, 1), duel("c", "b", 6, 4), duel("a", "d", 9, 2)]
    ratings, _ = bradley_terry(duels)
    for name in ratings:
        wins = expected = 0.0
        for one in duels:
            chance = expit((ratings[one.model][0] - ratings[one.opponent][0]) / SCALE)
            if name in (one.model, one.opponent):
                won = sum(one.outcomes)
                wins += won if name == one.model else len(one.outcomes) - won
                expected += len(one.outcomes) * (chance if name == one.model else 1 - chance)
        assert expected == pytest.approx(wins, abs=1e-6)


def test_what_has_no_ratings_is_said() -> None:
    apart = [duel("b", "a", 5, 5), duel("d", "c", 5, 5)]
    assert bradley_terry(apart) == ({}, "no comparison connects a, b with c, d")
    beaten = [duel("b", "a", 5, 5), duel("c", "a", 5, 0), duel("c", "b", 5, 0)]
    assert bradley_terry(beaten) == (
        {},
        "c neither lost to any other model nor tied with one, so no finite rating fits",
    )
    assert bradley_terry([*beaten, duel("c", "b", 0, 0, ties=1)])[1] is None
    worst = [duel("b", "a", 5, 5), duel("a", "c", 5, 0), duel("b", "c", 5, 0)]
    assert bradley_terry(worst)[1] == "a, b neither lost to any other model nor tied with one, so no finite rating fits"
    nothing = duel("b", "a", 0, 0)
    assert bradley_terry([nothing]) == ({}, "nothing was compared")


@pytest.mark.slow
def test_intervals_cover() -> None:
    """Three models, 60 prompts with an effect of their own on one of them: at least 93% of 95% intervals."""
    rng, truth, trials, hits = np.random.default_rng(0), np.array([0.0, 0.5, 1.0]), 200, 0
    shares = {(i, j): np.mean(expit(truth[j] - truth[i] + math.sqrt(0.5) * NODES)) for i, j in ((0, 1), (0, 2), (1, 2))}
    # the effects average out over the prompts: log-odds of mean chances are smaller than the strengths
    exact, _ = bradley_terry([exactly(f"{j}", f"{i}", share) for (i, j), share in shares.items()])
    for seed in range(trials):
        effect = rng.normal(0, 0.5, (60, 3))
        duels = []
        for i, j in ((0, 1), (0, 2), (1, 2)):
            chance = expit(truth[j] + effect[:, j] - truth[i] - effect[:, i])
            outcomes = (rng.random((60, 4)) < chance[:, None]).astype(float).ravel()
            duels.append(Duel(str(j), str(i), "gold", list(outcomes), [k // 4 for k in range(240)], [(1, 1)] * 240))
        ratings, _ = bradley_terry(duels, seed)
        hits += sum(low <= exact[name][0] <= high for name, (_, low, high) in ratings.items())
    assert 0.93 * 3 * trials <= hits < 0.985 * 3 * trials


NODES = np.random.default_rng(9).normal(size=20_000)


def exactly(model: str, opponent: str, share: float) -> Duel:
    wins = round(1000 * share)
    return duel(model, opponent, wins, 1000 - wins)
