"""Two models compared response by response: wins, ties, losses, and the win rate at equal length."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import expit

from rlhf_lightning.data.comparisons import digest
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.evaluation.policy import REWARDS, Evaluation
from rlhf_lightning.ops.bootstrap import bootstrap_interval, bootstrap_weights
from rlhf_lightning.ops.logistic import logistic
from rlhf_lightning.ops.statistics import Interval, as_columns, finite, share_interval
from rlhf_lightning.rewards.judged import conversation

RIDGE = (1.0, 0.01, 1.0)
"""L2 penalties of the length-controlled model: of phi, theta and psi. AlpacaEval holds phi by an L1 penalty and by
comparisons of the opponent with itself, asked for long and for short responses."""


@dataclass(frozen=True)
class Duel:
    """Two models compared on P pairs of responses to the same prompts.

    Args:
        by: what decided: gold, reward or judge.
        outcomes: (P,) 1 where the model's response is better, 0 where the opponent's is, 0.5 for a tie.
        prompts: (P,) the prompt of each pair, by which intervals are clustered.
        lengths: (P, 2) characters of the response of the model and of the opponent.
        beside: further figures, of a judge: name -> interval, or a count without one.
    """

    model: str
    opponent: str
    by: str
    outcomes: Sequence[float]
    prompts: Sequence[Hashable]
    lengths: Sequence[tuple[int, int]]
    beside: Mapping[str, Interval] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As in the names of metrics."""
        return f"{self.model}-{self.opponent}"

    def intervals(self, others: Sequence[Duel] = (), seed: int = 0) -> dict[str, Interval]:
        """Return count, wins, ties, losses, win_rate by Wilson and by bootstrap, length_controlled, and what is beside.

        A tie is half a win. Wilson's interval is for as many pairs as are independent, and with ties too wide, never
        too narrow. Without any outcome there are only counts.

        Args:
            others: duels among which those with the same opponent say how difficult each prompt is.
            seed: of the bootstrap.
        """
        values = np.asarray(self.outcomes, dtype=float)
        counts = {"wins": (values == 1).sum(), "ties": (values == 0.5).sum(), "losses": (values == 0).sum()}
        table: dict[str, Interval] = {name: (float(n), math.nan, math.nan) for name, n in counts.items()}
        if len(values):
            weights = bootstrap_weights(self.prompts, seed)
            clusters = len(set(self.prompts))
            table["win_rate"] = share_interval(self.outcomes, self.prompts)
            table["bootstrap"] = bootstrap_interval(weights @ values / weights.sum(1), clusters, share=True)
            controlled = length_controlled(values, self.lengths, difficulty(self, others), weights)
            told = 1 if len(set(values)) == 1 else clusters  # equal outcomes say nothing of its error
            table["length_controlled"] = bootstrap_interval(controlled, told, share=True)
        return table | dict(self.beside)


def length_controlled(
    outcomes: np.ndarray, lengths: Sequence[tuple[int, int]], difficulties: Sequence[float], weights: np.ndarray
) -> np.ndarray:
    """Return the win rates (B,) that are predicted where both responses are equally long.

    The model is that of AlpacaEval 2.0 (Dubois et al. 2024, arXiv 2404.04475): the log-odds of a win are
    theta + phi tanh((l_model - l_opponent) / s) + psi gamma_x, where l is the length in characters, s the standard
    deviation of the differences and gamma_x the difficulty of the prompt. The prediction is the mean of
    sigma(theta + psi gamma_x). A tie is half a win and half a loss.

    Args:
        outcomes: (P,) 1, 0.5 or 0.
        lengths: (P, 2) of the response of the model and of the opponent.
        difficulties: (P,) gamma_x.
        weights: (B, P) of the pairs, a row per resample.
    """
    differences = np.array([mine - theirs for mine, theirs in lengths], dtype=float)
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    columns = [np.tanh(differences / spread) if spread else np.zeros_like(differences), np.ones_like(differences)]
    columns.append(np.asarray(difficulties) - np.mean(difficulties))
    design = np.stack(columns, axis=1)
    fitted = logistic(design, weights * outcomes, weights * (1 - outcomes), RIDGE)
    design[:, 0] = 0.0
    return (expit(fitted @ design.T) * weights).sum(1) / weights.sum(1)


def difficulty(duel: Duel, others: Sequence[Duel]) -> list[float]:
    """Return (P,) how often other models beat the opponent of `duel` on the prompt of each pair; 0.5 where none did.

    AlpacaEval fits the difficulty of a prompt to all models of its leaderboard. The model itself is left out here:
    of few models it would explain its own outcomes.
    """
    sums: dict[Hashable, list[float]] = {}
    for other in others:
        if duel.by != other.by or duel.opponent not in (other.model, other.opponent):
            continue
        if duel.model in (other.model, other.opponent):
            continue
        for prompt, outcome in zip(other.prompts, other.outcomes, strict=True):
            sums.setdefault(prompt, []).append(outcome if other.opponent == duel.opponent else 1 - outcome)
    known = [value for values in sums.values() for value in values]
    otherwise = sum(known) / len(known) if known else 0.5
    return [sum(sums[p]) / len(sums[p]) if p in sums else otherwise for p in duel.prompts]


def opponents(names: Sequence[str], first: str, against: str | None = None) -> list[tuple[str, str]]:
    """Return (model, opponent) of every two models, or of each against one.

    Args:
        first: the opponent in every pair that it is in.
        against: the opponent of all; None compares every two.

    Raises:
        UserError: there is no model of this name, or nothing to compare it with.
    """
    if against is not None:
        if against not in names:
            raise UserError(f"evaluate.against={against} is none of {', '.join(names)}.{nearest(against, names)}")
        if len(names) < 2:
            raise UserError(f"evaluate.against={against}: there is no other model to compare it with")
        return [(name, against) for name in names if name != against]
    ordered = sorted(names, key=lambda name: name != first)
    return [(model, opponent) for opponent, model in itertools.combinations(ordered, 2)]


@dataclass(frozen=True)
class Pair:
    """The responses of two models to one prompt: their places in the two evaluations, and the prompt."""

    mine: int
    theirs: int
    prompt: str


def paired(model: Evaluation, opponent: Evaluation) -> list[Pair]:
    """Return the pairs of responses to the same prompt of the same row, or of the same number of generation."""
    places = {place: number for number, place in enumerate(opponent.places)}
    return [
        Pair(mine, places[place], prompt_key(model, mine)) for mine, place in enumerate(model.places) if place in places
    ]


def prompt_key(evaluation: Evaluation, place: int) -> str:
    """Return what responses to the same conversation share, whatever the tokenizer."""
    metadata = evaluation.metadata[place] if evaluation.metadata else {}
    return digest(conversation(str(evaluation.samples[place]["prompt"]), metadata), ())


def by_scores(answered: Mapping[str, Evaluation], pairs: Sequence[tuple[str, str]]) -> list[Duel]:
    """Return the duels by gold and by reward, where both responses of a pair have a score; equal scores are a tie."""
    duels = []
    for by in REWARDS:
        for model, opponent in pairs:
            ours, theirs = answered[model], answered[opponent]
            if by not in ours.columns or by not in theirs.columns:
                continue
            scored = [
                (pair, ours.columns[by][pair.mine], theirs.columns[by][pair.theirs]) for pair in paired(ours, theirs)
            ]
            scored = [(pair, a, b) for pair, a, b in scored if a is not None and b is not None]
            outcomes = [0.5 + ((a > b) - (a < b)) / 2 for _, a, b in scored]
            duels.append(duel(model, opponent, by, answered, [pair for pair, *_ in scored], outcomes))
    return duels


def duel(
    model: str,
    opponent: str,
    by: str,
    answered: Mapping[str, Evaluation],
    pairs: Sequence[Pair],
    outcomes: Sequence[float],
    beside: Mapping[str, Interval] | None = None,
) -> Duel:
    """Return the duel of two models with these outcomes of `pairs`."""
    mine, theirs = answered[model].samples, answered[opponent].samples
    lengths = [(len(mine[pair.mine]["response"]), len(theirs[pair.theirs]["response"])) for pair in pairs]
    return Duel(model, opponent, by, outcomes, [pair.prompt for pair in pairs], lengths, beside or {})


def rows_of(duels: Sequence[Duel], figures: Sequence[Mapping[str, Interval]]) -> list[dict[str, Any]]:
    """Return the rows of tables/win_rates.jsonl."""
    rows = []
    for one, table in zip(duels, figures, strict=True):
        row: dict[str, Any] = {"model": one.model, "opponent": one.opponent, "by": one.by, "count": len(one.outcomes)}
        for name, (value, low, high) in table.items():
            if name == "win_rate":
                row |= as_columns(name, (value, low, high))
            elif name == "bootstrap":
                row |= {"bootstrap_low": finite(low), "bootstrap_high": finite(high)}
            elif name in COUNTS:
                row[name] = int(value)
            else:
                row |= {name: value, f"{name}_low": finite(low), f"{name}_high": finite(high)}
        for place, name in enumerate(("characters", "opponent_characters")):
            row[name] = sum(pair[place] for pair in one.lengths) / len(one.lengths) if one.lengths else None
        rows.append(row)
    return rows


COUNTS = ("wins", "ties", "losses", "failed")
