"""Proxy and gold reward against the distance from the reference, d = sqrt(KL): curves, fits, and where gold peaks."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.special import xlogy

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.policy import Evaluation
from rlhf_lightning.ops.best_of_n import best_of_n_kl_with_ties, best_of_n_means
from rlhf_lightning.ops.kl import best_of_n_kl
from rlhf_lightning.ops.seeding import derive_seed
from rlhf_lightning.ops.statistics import Interval, mean_interval

BEST_OF_N = "best_of_n"
RESAMPLES, FEWEST_PROMPTS, FEWEST_POINTS = 1000, 20, 4
"""Of the bootstrap; prompts below which percentiles cover too little; points below which a fit says nothing."""


@dataclass(frozen=True)
class Curve:
    """M policies of one method against one proxy reward, in ascending KL; every array is (M, R), per row of prompts.

    Args:
        kl: nats per response, the k1 estimate; of best-of-n the bound log n - (n - 1) / n.
        more: name -> (M, R) of further measures of each point: another estimate of the KL.
        gold: None where there is no gold reward.
        start: (R,) gold reward of the reference, d = 0.
        prompts: (R,) rows with an equal entry are one cluster.
    """

    method: str
    proxy: str
    settings: Sequence[str]
    kl: np.ndarray
    reward: np.ndarray
    gold: np.ndarray | None
    start: np.ndarray | None
    prompts: Sequence[Hashable]
    more: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """The form, "square" or "log", its coefficients with their 95% intervals, and R^2 over the points."""

    form: str
    a: Interval
    b: Interval
    r2: float
    points: int


# ---- curves --------------------------------------------------------------------------------------------------------


def best_of_n_curve(answers: Evaluation, proxy: str, of: str = "reward") -> Curve:
    """Return best-of-n for n = 1 to the number of generations, from all subsets of the responses of the reference.

    Args:
        answers: N responses of the reference to every prompt.
        proxy: the name of the reward that chooses; of: its column in `answers`.
    """
    size = 1 + max(number for _, number in answers.places)
    rows = len(answers.places) // size
    scores = _rows(answers, of, size)
    gold = _rows(answers, "gold", size) if "gold" in answers.columns else None
    both = torch.stack([scores, scores if gold is None else gold], 1)  # (R, 2, N)
    means = torch.stack([best_of_n_means(*pair) for pair in zip(scores, both, strict=True)]).numpy()
    ties = torch.stack([best_of_n_kl_with_ties(row) for row in scores]).numpy()
    bound = np.array([best_of_n_kl(n) for n in range(1, size + 1)])
    return Curve(
        BEST_OF_N, proxy, [f"n={n}" for n in range(1, size + 1)], np.repeat(bound[:, None], rows, 1), means[:, 0].T,
        None if gold is None else means[:, 1].T, None if gold is None else means[:, 1, 0],
        answers.prompts[::size], {"kl_ties": ties.T},
    )  # fmt: skip


def policy_curve(
    method: str, proxy: str, answers: Mapping[str, Evaluation], start: np.ndarray | None, of: str = "reward"
) -> Curve:
    """Return the curve of policies of one method: setting -> responses to the same prompts as the reference's.

    Args:
        start: (R,) gold reward of the reference.
    """
    mean_kl = {name: float(np.mean(np.array(answer.columns["kl"]))) for name, answer in answers.items()}
    settings = sorted(answers, key=mean_kl.__getitem__)
    first = next(iter(answers.values()))
    size = 1 + max(number for _, number in first.places)

    def column(name: str) -> np.ndarray:
        return np.stack([_rows(answers[setting], name, size).mean(1).numpy() for setting in settings])

    gold = column("gold") if "gold" in first.columns else None
    more = {name: column(name) for name in ("kl_k3", "kl_exact") if name in first.columns}
    return Curve(method, proxy, settings, column("kl"), column(of), gold, start, first.prompts[::size], more)


def _rows(answers: Evaluation, column: str, size: int) -> torch.Tensor:
    """Return a column by row and generation.

    Raises:
        UserError: a response without a value; a judge may fail to rate one.
    """
    if missing := sum(value is None for value in answers.columns[column]):
        raise UserError(f"{missing} of {len(answers.samples)} responses have no {column}: a curve needs all of them")
    return torch.tensor(answers.columns[column], dtype=torch.float64).view(-1, size)


# ---- fits ----------------------------------------------------------------------------------------------------------


def fit(curve: Curve, seed: int = 0) -> Fit | None:
    """Return the least-squares fit of gold reward gained over the reference; None with too few points.

    The forms are those of Gao, Schulman and Hilton 2022 (arXiv 2210.10760): d (a - b d), "square", for best-of-n and
    d (a - b log d), "log", for methods that update the policy. Points are weighted by the distance in d to their
    neighbors, so that many policies at nearly the same d weigh as much as one. Intervals are percentiles of a bootstrap
    over prompts (Efron and Tibshirani 1993), of gold reward and KL together: they are about these policies on other
    prompts, and say nothing of another seed of training. With fewer than 20 prompts the ends are NaN.

    Raises:
        ValueError: the curve has no gold reward.
    """
    if curve.gold is None or curve.start is None:
        raise ValueError("a fit needs a gold reward")
    form = "square" if curve.method == BEST_OF_N else "log"
    names = {prompt: number for number, prompt in enumerate(dict.fromkeys(curve.prompts))}
    cluster = np.array([names[prompt] for prompt in curve.prompts])

    def per_cluster(values: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(cluster, row, len(names)) for row in values], 1)  # (C, M)

    kl, gain, count = per_cluster(curve.kl), per_cluster(curve.gold - curve.start), np.bincount(cluster)[:, None]

    def fitted(weights: np.ndarray) -> tuple[float, float, float] | None:
        rows = (weights * count[:, 0]).sum()
        return least_squares((weights @ kl) / rows, (weights @ gain) / rows, form)

    best = fitted(np.ones(len(names)))
    if best is None:
        return None
    rng = np.random.default_rng(derive_seed(seed, "fit", curve.method, curve.proxy))
    draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    found = np.array([values[:2] for draw in draws if (values := fitted(draw)) is not None])
    enough = len(names) >= FEWEST_PROMPTS and len(found) >= 0.95 * RESAMPLES
    low, high = np.percentile(found, [2.5, 97.5], axis=0) if enough else np.full((2, 2), math.nan)
    a, b, r2 = best
    return Fit(form, (a, low[0], high[0]), (b, low[1], high[1]), r2, len(curve.settings))


def least_squares(kl: Sequence[float] | np.ndarray, gain: Any, form: str) -> tuple[float, float, float] | None:
    """Return a, b and R^2 of `form` by weighted least squares; None where the points do not decide them.

    Args:
        kl: (M,) in nats; an estimate below 0 counts as 0.
        gain: (M,) gold reward less that of the reference.
    """
    d = np.sqrt(np.clip(np.asarray(kl, dtype=float), 0.0, None))
    order = np.argsort(d, kind="stable")
    d, gain = d[order], np.asarray(gain, dtype=float)[order]
    if len(d) < FEWEST_POINTS:
        return None
    weight = np.gradient(np.concatenate([[0.0], d]))[1:]  # d = 0 belongs to every curve
    columns = np.stack([d, -(d * d if form == "square" else xlogy(d, d))], 1)
    root = np.sqrt(weight)[:, None]
    solution, _, rank, _ = np.linalg.lstsq(columns * root, gain * root[:, 0], rcond=1e-9)
    if rank < 2:
        return None
    centre = np.average(gain, weights=weight)
    left, whole = (np.average((gain - of) ** 2, weights=weight) for of in (columns @ solution, centre))
    return float(solution[0]), float(solution[1]), float(1 - left / whole) if whole > 0 else math.nan


# ---- where to stop -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """The policy of a curve with the highest gold reward, or proxy reward where there is no gold.

    `lost` is what the policy with the largest KL has less, paired by prompt, with its 95% interval. As the peak is the
    largest of several estimates, it is a little too high.
    """

    setting: str
    kl: float
    reward: Interval
    lost: Interval


def peak(curve: Curve) -> Peak:
    """Return where the gold reward (without one the proxy's) of a curve is highest."""
    values = curve.reward if curve.gold is None else curve.gold
    place = int(values.mean(1).argmax())
    reward, lost = (mean_interval(list(v), curve.prompts) for v in (values[place], values[place] - values[-1]))
    return Peak(curve.settings[place], float(curve.kl[place].mean()), reward, lost)


# ---- tables --------------------------------------------------------------------------------------------------------


def points(curve: Curve, seed: int) -> list[dict[str, Any]]:
    """Return the rows of the table `overoptimization` of one curve; `low` and `high` are those of the gold reward."""
    rows = []
    for place, setting in enumerate(curve.settings):
        kl, proxy = (mean_interval(list(v[place]), curve.prompts) for v in (curve.kl, curve.reward))
        gold = mean_interval(list(curve.gold[place]), curve.prompts) if curve.gold is not None else (None,) * 3
        exact = curve.method == BEST_OF_N
        row = {
            "method": curve.method,
            "proxy": curve.proxy,
            "seed": seed,
            "setting": setting,
            "kl": kl[0],
            "kl_low": kl[0] if exact else kl[1],
            "kl_high": kl[0] if exact else kl[2],
            "proxy_reward": proxy[0],
            "proxy_low": proxy[1],
            "proxy_high": proxy[2],
            "gold_reward": gold[0],
            "low": gold[1],
            "high": gold[2],
            "count": len(curve.prompts),
        }
        rows.append(row | {name: float(values[place].mean()) for name, values in curve.more.items()})
    return [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]


def frontier(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the table `frontier` from those of `overoptimization`: reward against KL.

    `reward` is the gold reward, without one the proxy's; `best` says that no other policy against the same proxy has
    at least as much reward at no more KL.
    """
    rows = []
    for row in table:
        gold = row["gold_reward"] is not None
        reward = [
            row[key]
            for key in (("gold_reward", "low", "high") if gold else ("proxy_reward", "proxy_low", "proxy_high"))
        ]
        place = {key: row[key] for key in ("method", "proxy", "seed", "setting", "kl")}
        rows.append(place | dict(zip(("reward", "low", "high"), reward, strict=True)))
    for row in rows:
        others = [other for other in rows if other is not row and other["proxy"] == row["proxy"]]
        row["best"] = not any(
            other["kl"] <= row["kl"] and other["reward"] >= row["reward"]
            and (other["kl"], other["reward"]) != (row["kl"], row["reward"])
            for other in others
        )  # fmt: skip
    return rows
