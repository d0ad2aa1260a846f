"""Duels decided by a judge, which is asked about every pair of responses in both orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlhf_lightning.evaluation.policy import Evaluation
from rlhf_lightning.evaluation.win_rates import Duel, Pair, duel, paired
from rlhf_lightning.judges.judge import Answer, Judge, Verdict
from rlhf_lightning.ops.statistics import Interval, mean_interval, share_interval
from rlhf_lightning.rewards.judged import comparison

NOT_ASKED = Verdict((Answer(0.5),), (Answer(0.5),))
"""Of two equal responses."""


@dataclass
class Judged:
    """The duels of a judge, and a row of tables/verdicts.jsonl for every pair of responses."""

    duels: list[Duel] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


def by_judge(judge: Judge, answered: Mapping[str, Evaluation], pairs: Sequence[tuple[str, str]]) -> Judged:
    """Return the duels of models by a judge.

    A model wins a pair where its response is better in both orders; a verdict that changes with the order is a tie, and
    so are equal responses, about which nothing is asked. A pair without a verdict is counted as `failed` and left out.
    Beside: `preference`, the mean probability that the model's response is better; `first_shown`, the share of single
    verdicts for the response that is shown first, 0.5 without position bias; `flips`, the share of pairs whose
    preference turns with the order.

    Args:
        pairs: (model, opponent), names of `answered`.
    """
    compared = {names: paired(answered[names[0]], answered[names[1]]) for names in pairs}
    total = sum(map(len, compared.values()))
    Console().print(
        f"judge       {judge.name}: {total} pairs of responses, in both orders", soft_wrap=True, markup=False
    )
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    result = Judged()
    with Progress(*columns, transient=True, disable=not Console().is_terminal) as progress:
        task = progress.add_task("judging", total=total)
        for (model, opponent), members in compared.items():
            progress.update(task, description=f"{model} against {opponent}")
            verdicts = _verdicts(judge, answered[model], answered[opponent], members, lambda: progress.advance(task))
            known = [(pair, v, v.outcome) for pair, v in zip(members, verdicts, strict=True) if v.outcome is not None]
            beside = figures([v for _, v, _ in known], [pair.prompt for pair, *_ in known])
            beside["failed"] = (float(len(members) - len(known)), float("nan"), float("nan"))
            outcomes = [outcome for *_, outcome in known]
            decided = [pair for pair, *_ in known]
            result.duels.append(duel(model, opponent, "judge", answered, decided, outcomes, beside))
            result.rows += [
                _row(model, opponent, answered, pair, verdict) for pair, verdict in zip(members, verdicts, strict=True)
            ]
    return result


def _verdicts(judge: Judge, ours: Evaluation, theirs: Evaluation, pairs: Sequence[Pair], advance: Any) -> list[Verdict]:
    """Return the verdict on each pair."""
    verdicts, asked, places = [NOT_ASKED] * len(pairs), [], []
    for place, pair in enumerate(pairs):
        prompt, mine = (str(ours.samples[pair.mine][name]) for name in ("prompt", "response"))
        other = str(theirs.samples[pair.theirs]["response"])
        if mine.strip() == other.strip():
            advance()
            continue
        metadata = dict(ours.metadata[pair.mine]) if ours.metadata else {}
        asked.append(comparison([prompt], [mine, other], metadata))
        places.append(place)
    for number, verdict in judge.compare(asked):
        verdicts[places[number]] = verdict
        advance()
    return verdicts


def figures(verdicts: Sequence[Verdict], prompts: Sequence[str]) -> dict[str, Interval]:
    """Return preference, first_shown and flips of verdicts with answers in both orders; equal responses are no pair."""
    if not verdicts:
        return {}
    orders = [(verdict.orders, prompt) for verdict, prompt in zip(verdicts, prompts, strict=True)]
    sides = [((forward or 0.0), (swapped or 0.0), prompt) for (forward, swapped), prompt in orders]
    table = {"preference": mean_interval([(a + b) / 2 for a, b, _ in sides], list(prompts))}
    sides = [side for side, verdict in zip(sides, verdicts, strict=True) if verdict is not NOT_ASKED]
    shown = [(float(p > 0.5), prompt) for a, b, prompt in sides for p in (a, 1 - b) if p != 0.5]
    if shown:
        table["first_shown"] = share_interval([value for value, _ in shown], [prompt for _, prompt in shown])
    if sides:
        flips = [float((a - 0.5) * (b - 0.5) < 0) for a, b, _ in sides]
        table["flips"] = share_interval(flips, [prompt for *_, prompt in sides])
    return table


def _row(model: str, opponent: str, answered: Mapping[str, Evaluation], pair: Pair, verdict: Verdict) -> dict[str, Any]:
    mine, theirs = answered[model].samples[pair.mine], answered[opponent].samples[pair.theirs]
    forward, swapped = verdict.orders
    row = {
        "model": model, "opponent": opponent, "prompt": mine["prompt"], "response": mine["response"],
        "opponent_response": theirs["response"], "forward": forward, "swapped": swapped, "outcome": verdict.outcome,
    }  # fmt: skip
    failure = next((answer.failure for answer in verdict.answers if answer.failure), None)
    extra = {"principle": verdict.principle, "failure": failure if verdict.outcome is None else None}
    return row | {name: value for name, value in extra.items() if value is not None}
