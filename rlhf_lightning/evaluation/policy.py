"""Evaluating a policy: its responses to held-out prompts, their rewards, and the KL to a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rlhf_lightning.data.base import RowData
from rlhf_lightning.data.checks import ids_fit
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.answers import answer, start
from rlhf_lightning.generation.engine import Engine, truncation
from rlhf_lightning.models.completion import CompletionModel, choose_layout, response_logprobs, vocabulary_size
from rlhf_lightning.ops.groups import Group
from rlhf_lightning.ops.kl import KLEstimator, best_of_n_kl, kl_estimate
from rlhf_lightning.ops.statistics import Interval, mean_interval, share_interval
from rlhf_lightning.rewards.ensemble import DISAGREEMENT
from rlhf_lightning.rewards.judged import JudgeReward
from rlhf_lightning.rewards.scoring import Reward, score_groups

SHARES = (
    "ended_with_eos",
    "refused_harmful",
    "over_refused",
    "corrected",
    "flattered",
    "correct",
    "padded",
    "accuracy",
    "reward_failed",
    "gold_failed",
)
"""Metrics that are shares; their interval is Wilson's."""
REWARDS = ("reward", "gold")
KL = ("kl", "kl_k3")
"""Estimates of the KL of a policy's own responses, which say nothing of a choice between them."""


@dataclass(frozen=True)
class Evaluation:
    """The responses of one policy to R rows with n generations each, and their values.

    `columns` holds per metric one value (or None, where it does not apply) per response; `places` the row and the
    number of the generation; `prompts` what the responses to one prompt have in common. `groups` has for a reward with
    groups their names; their scores are the columns <reward>_<group>. `metadata` has per response what rewards and
    judges get with it.
    """

    columns: Mapping[str, Sequence[float | None]]
    places: Sequence[tuple[int, int]]
    prompts: Sequence[tuple[int, ...]]
    samples: list[dict[str, Any]]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    metadata: Sequence[dict[str, Any]] = ()

    def intervals(self) -> dict[str, Interval]:
        """Return metric -> (mean, low, high); <reward>_worst is that of the group with the lowest mean."""
        known = {metric: column for metric, column in self.columns.items() if any(v is not None for v in column)}
        table = {metric: interval(metric, column, self.prompts) for metric, column in known.items()}
        for reward, names in self.groups.items():
            table[f"{reward}_worst"] = min(table[f"{reward}_{name}"] for name in names)
        return table

    def best_of(self, n: int, by: str = "reward", to_reference: bool = True) -> Evaluation:
        """Return the policy that samples n responses and keeps the one with the highest score.

        The generations of a prompt are taken n at a time, so each choice is a sample of that policy. Its KL to the
        model that it samples from is at most log n - (n - 1) / n (Beirami et al. 2024, arXiv 2401.01879): `kl` here.

        Args:
            by: the column that decides; equal scores leave the first. A response without a score is not chosen, and
                where none of n has one, nothing is.
            to_reference: whether the model is the one that `kl` is measured to; else there is no `kl`.

        Raises:
            ValueError: there are fewer than n generations of a prompt.
            KeyError: there is no such column.
        """
        generations = 1 + max(number for _, number in self.places)
        if not 1 <= n <= generations:
            raise ValueError(f"the best of {n} of {generations} generations")
        decided, best = self.columns[by], dict[tuple[int, int], int]()
        for place, (row, number) in enumerate(self.places):
            block, score = (row, number // n), decided[place]
            if score is None or number >= generations // n * n:
                continue
            if block not in best or score > decided[best[block]]:  # type: ignore[operator]
                best[block] = place
        chosen = list(best.values())
        kept = {name: column for name, column in self.columns.items() if name not in KL}
        columns = {name: [column[place] for place in chosen] for name, column in kept.items()}
        if "kl" in self.columns and to_reference:
            columns["kl"] = [best_of_n_kl(n)] * len(chosen)
        samples = [{k: v for k, v in self.samples[place].items() if k not in KL} for place in chosen]
        metadata = [self.metadata[place] for place in chosen] if self.metadata else ()
        return Evaluation(
            columns, list(best), [self.prompts[place] for place in chosen], samples, self.groups, metadata
        )

    def minus(self, other: Evaluation) -> dict[str, Interval]:
        """Return metric -> (mean, low, high) of the difference to another policy on the same rows.

        Paired: the difference is taken response by response, which both policies sampled with the same random numbers,
        so what the prompts have in common does not widen the interval. Of rewards there is also `<reward>_win_rate`,
        the share of responses with a higher one than the other's; equal ones count half.
        """
        theirs = {place: number for number, place in enumerate(other.places)}
        pairs = [(mine, theirs[place]) for mine, place in enumerate(self.places) if place in theirs]
        found = {}
        for metric in self.columns.keys() & other.columns.keys():
            ours, others = self.columns[metric], other.columns[metric]
            both = [(i, ours[i], others[j]) for i, j in pairs if ours[i] is not None and others[j] is not None]
            if both:
                gaps = [float(a) - float(b) for _, a, b in both]  # type: ignore[arg-type]
                asked = [self.prompts[i] for i, *_ in both]
                found[metric] = mean_interval(gaps, asked)
                if metric in REWARDS:
                    found[f"{metric}_win_rate"] = share_interval([(gap > 0) + 0.5 * (gap == 0) for gap in gaps], asked)
        rates = [f"{metric}_win_rate" for metric in REWARDS]
        return {metric: found[metric] for metric in [*self.columns, *rates] if metric in found}


def evaluate_policy(
    lm: Any,
    data: RowData,
    engine: Engine,
    *,
    reference: Callable[[], Any] | None = None,
    rewards: Mapping[str, Reward] | None = None,
    rows: int = 256,
    num_generations: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    title: str = "answers",
) -> Evaluation:
    """Return the responses of one language model and what they measure.

    Args:
        lm: a Hugging Face causal LM, or a peft model around one.
        data: a set-up data module; its held-out prompts are answered, the training ones where there are no others.
        engine: generates the responses; it is started and closed here.
        reference: returns the model that the KL is measured to; None measures none. Greedy responses are not samples,
            so with temperature 0 there is no KL.
        rewards: metric -> what scores the responses. One with a function `measures(row, response)` adds its measures.
        rows: prompts answered, at most.
        seed: the same for all models that are compared; the same random numbers make differences clearer.
    """
    split = "val" if "val" in data.rows else "train"
    ids_fit(data, split, vocabulary_size(lm))
    prompts = [data.group(split, row) for row in range(min(rows, len(data.rows[split])))]
    lm.to(device)
    start(engine, lm, data.template)
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=len(prompts))
        answers = answer(
            engine,
            data.template,
            prompts,
            num_generations,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed_parts=(seed, "evaluate"),
            progress=lambda count: progress.advance(task, count),
        )
    engine.close()
    scores: dict[str, Sequence[float | None]] = {
        "length": [float(len(ids)) for ids in answers.token_ids],
        "ended_with_eos": [float(done) for done in answers.finished],
    }
    if reference is not None and temperature > 0 and not truncation(engine):  # else samples are not the model's
        scores |= sequence_kl(lm, reference(), answers.groups(prompts), temperature, device)
    places = [(group.index, k) for group in prompts for k in range(num_generations)]
    clusters = [tuple(group.prompt) for group in prompts for _ in range(num_generations)]
    return scored(scores, places, clusters, answers.prompts, answers.texts, answers.metadata, rewards or {})


def scored(
    columns: Mapping[str, Sequence[float | None]],
    places: Sequence[tuple[int, int]],
    clusters: Sequence[Any],
    prompts: Sequence[str],
    texts: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    rewards: Mapping[str, Reward],
) -> Evaluation:
    """Return the evaluation of S responses with the scores and measures of the rewards beside `columns`.

    A response that a judge did not rate has no score; `<reward>_failed` is 1 for it, and 0 for the others.

    Args:
        places, clusters, prompts, texts, metadata: (S,) as in :class:`Evaluation`; prompts as rewards read them.
    """
    scores, groups = dict(columns), dict[str, list[str]]()
    for name, reward in rewards.items():
        judged = isinstance(reward, JudgeReward)
        parts = score_groups(reward, prompts, texts, metadata, skip=judged)
        found = {f"{name}_{part}" if part else name: values.tolist() for part, values in parts.items()}
        if judged:
            failed = [float(math.isnan(value)) for value in found[name]]
            found = {name: [None if math.isnan(value) else value for value in found[name]]}
            found |= {f"{name}_failed": failed} if any(failed) else {}
        scores |= found
        if members := [part for part in parts if part not in ("", DISAGREEMENT)]:
            groups[name] = members
        if measures := getattr(reward, "measures", None):
            rows_measured = [measures(*pair) for pair in zip(metadata, texts, strict=True)]
            scores |= {m: [row.get(m) for row in rows_measured] for m in dict.fromkeys(chain(*rows_measured))}
    kept = {f"gold_{name}" for name in [*groups.get("gold", ()), "failed"]}
    hidden = {name for name in scores if name.startswith("gold_") and name not in kept}  # the same as gold
    samples = [
        {"prompt": prompts[i], "response": texts[i]}
        | {name: column[i] for name, column in scores.items() if column[i] is not None and name not in hidden}
        for i in range(len(texts))
    ]
    return Evaluation(scores, places, clusters, samples, groups, metadata)


def interval(metric: str, values: Sequence[float | None], prompts: Sequence[Any]) -> Interval:
    """Return mean and 95% interval, Wilson's for shares; responses to one prompt are not independent."""
    places = [place for place, value in enumerate(values) if value is not None]
    numbers = [float(values[place]) for place in places]  # type: ignore[arg-type]
    return (share_interval if metric in SHARES else mean_interval)(numbers, [prompts[place] for place in places])


@torch.no_grad()
def sequence_kl(
    lm: Any, reference: Any, groups: Sequence[Group], temperature: float, device: str
) -> dict[str, list[float]]:
    """Return two estimates of KL(pi : ref) in nats for every response, whose means over samples are unbiased.

    `kl` is k1 summed over the tokens, log pi(y) - log pi_ref(y), and `kl_k3` the sum of k3, never negative
    (:func:`rlhf_lightning.ops.kl.kl_estimate`).

    Args:
        groups: prompts with the responses that `lm` gave at `temperature`, whose distribution is compared.

    Raises:
        UserError: the reference has another vocabulary.
    """
    if reference.config.get_text_config().vocab_size != lm.config.get_text_config().vocab_size:
        raise UserError("the reference has another vocabulary than the model, so there is no KL to it")
    layout, _ = choose_layout(lm)
    policy, other = (
        response_logprobs(CompletionModel(model.eval()), groups, layout, device, temperature)
        for model in (lm, reference.to(device))
    )
    pairs = list(zip(chain(*policy), chain(*other), strict=True))
    kinds: dict[str, KLEstimator] = {"kl": "k1", "kl_k3": "k3"}
    return {name: [kl_estimate(*pair, kind).sum().item() for pair in pairs] for name, kind in kinds.items()}
