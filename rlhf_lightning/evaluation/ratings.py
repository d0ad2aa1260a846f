"""Ratings of several models from their duels: Bradley-Terry on the scale of Elo."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rlhf_lightning.evaluation.win_rates import Duel
from rlhf_lightning.ops.bootstrap import bootstrap_interval, bootstrap_weights
from rlhf_lightning.ops.logistic import logistic
from rlhf_lightning.ops.statistics import Interval

SCALE, MEAN = 400 / math.log(10), 1000.0
"""400 points are odds of 10 to 1; the mean rating of the models that are compared."""


def bradley_terry(duels: Sequence[Duel], seed: int = 0) -> tuple[dict[str, Interval], str | None]:
    """Return model -> rating with its interval, or no ratings and the reason.

    The Bradley-Terry model says P(i beats j) = sigma(b_i - b_j) (Bradley and Terry 1952); a tie is half a win of each.
    b is its maximum likelihood estimate, a rating 1000 + 400 / ln(10) (b_i - mean b). Elo's update after each game is
    a stochastic gradient step on the same likelihood, so its ratings depend on the order of the games. The estimate
    exists when every model is connected to every other one by a chain of wins or ties (Ford 1957).

    Args:
        duels: all by the same, gold, reward or judge.
        seed: of the bootstrap over prompts.
    """
    duels = [duel for duel in duels if len(duel.outcomes)]
    models = list(dict.fromkeys(name for duel in duels for name in (duel.opponent, duel.model)))
    if len(models) < 2:
        return {}, "nothing was compared"
    prompts = list(dict.fromkeys(prompt for duel in duels for prompt in duel.prompts))
    wins, losses = (np.zeros((len(prompts), len(duels))) for _ in range(2))
    places: dict[Hashable, int] = {prompt: place for place, prompt in enumerate(prompts)}
    for number, duel in enumerate(duels):
        rows = [places[prompt] for prompt in duel.prompts]
        np.add.at(wins[:, number], rows, duel.outcomes)
        np.add.at(losses[:, number], rows, 1 - np.asarray(duel.outcomes))
    sides = [(models.index(duel.model), models.index(duel.opponent)) for duel in duels]
    if reason := _unbounded(models, sides, wins.sum(0), losses.sum(0)):
        return {}, reason
    design = np.zeros((len(duels), len(models)))
    for number, (model, opponent) in enumerate(sides):
        design[number, model], design[number, opponent] = 1.0, -1.0
    weights = bootstrap_weights(prompts, seed)
    strengths = np.pad(logistic(design[:, 1:], weights @ wins, weights @ losses), ((0, 0), (1, 0)))
    ratings = MEAN + SCALE * (strengths - strengths.mean(1, keepdims=True))
    return {name: bootstrap_interval(ratings[:, i], len(prompts)) for i, name in enumerate(models)}, None


def _unbounded(
    models: Sequence[str], sides: Sequence[tuple[int, int]], wins: np.ndarray, losses: np.ndarray
) -> str | None:
    """Return why no finite ratings have the highest likelihood, None where they exist."""
    size = (len(models), len(models))
    edges = [(i, j) for (i, j), won in zip(sides, wins, strict=True) if won]
    edges += [(j, i) for (i, j), lost in zip(sides, losses, strict=True) if lost]
    graph = coo_array((np.ones(len(edges)), tuple(zip(*edges, strict=True))), size)
    parts, part = connected_components(graph, connection="weak")
    if parts > 1:
        apart = [", ".join(name for i, name in enumerate(models) if part[i] == number) for number in range(parts)]
        return f"no comparison connects {' with '.join(apart)}"
    parts, part = connected_components(graph, connection="strong")
    if parts > 1:
        beaten = {int(part[j]) for i, j in edges if part[i] != part[j]}
        best = next(number for number in range(parts) if number not in beaten)
        names = ", ".join(name for i, name in enumerate(models) if part[i] == best)
        return f"{names} neither lost to any other model nor tied with one, so no finite rating fits"
    return None
