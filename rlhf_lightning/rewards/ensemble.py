"""Ensembles of rewards, combined into one: the mean, the worst case, or the mean less a multiple of the variance.

A policy that exploits one reward model finds responses that only this one likes. Members trained from other seeds or
rows disagree about such responses, and a combination that counts the disagreement is harder to exploit (Coste et al.
2023, arXiv 2310.02743).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from rlhf_lightning.errors import UserError, check_number, nearest

MEAN, WORST, UWO = "mean", "worst", "uwo"
DISAGREEMENT = "disagreement"
"""What the standard deviation over the members of an ensemble is called beside its scores."""
Aggregation = str | Mapping[str, float]
"""A value of `reward_ensemble`: "mean", "worst", or {"uwo": lambda}."""


def check_aggregation(how: Aggregation) -> None:
    """Raise a UserError for what is no value of `reward_ensemble`."""
    if isinstance(how, Mapping) and list(how) == [UWO]:
        check_number(f"reward_ensemble.{UWO}", how[UWO], "[0, inf)")
    elif how not in (MEAN, WORST):
        hint = nearest(str(how), [MEAN, WORST, UWO])
        raise UserError(f"reward_ensemble={how!r} is not {MEAN}, {WORST} or {{{UWO}: <lambda>}}.{hint}")


def aggregated(scores: Tensor, how: Aggregation) -> Tensor:
    """Return the reward (S,) of the scores (M, S) of the members of an ensemble; NaN is no score.

    "worst" is min_i r_i, {"uwo": lambda} is mean_i r_i - lambda mean_i (r_i - mean_j r_j)^2, uncertainty-weighted
    optimization (arXiv 2310.02743, section 3.2).
    """
    if how == WORST:
        return scores.nan_to_num(math.inf).amin(0).masked_fill(scores.isnan().all(0), math.nan)
    mean = scores.nanmean(0)
    return mean - how[UWO] * disagreement(scores) ** 2 if isinstance(how, Mapping) else mean


def disagreement(scores: Tensor) -> Tensor:
    """Return the standard deviation (S,) over the members of their scores (M, S), with the divisor M; NaN is none."""
    return ((scores - scores.nanmean(0)) ** 2).nanmean(0).sqrt()
