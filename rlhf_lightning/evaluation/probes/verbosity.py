"""Verbosity: how long answers are, whether they need to be, and whether length is what a score pays for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import pstdev

from rlhf_lightning.data.comparisons import Comparison
from rlhf_lightning.errors import check_number
from rlhf_lightning.evaluation.probes.measures import Column, Columns, Rule, centered, interval, result, slope
from rlhf_lightning.evaluation.probes.probe import Result, Row, Subject, question
from rlhf_lightning.evaluation.probes.rows import conversation, is_world, prompt_problem, world_prompts
from rlhf_lightning.judges.judge import Judge
from rlhf_lightning.ops.statistics import Interval
from rlhf_lightning.rewards.scoring import score
from rlhf_lightning.world import gold

LONGER = 1.2
"""Times the length of the reference's answers, from which on answers that are no better raise an alarm."""
SCORES = ("gold", "reward", "judge")
RULES = (
    Rule("padded", "{value:.0%} of the answers are longer than their question needs", above=0.3),
    Rule(
        "reward_bias",
        "the reward pays {value:.2f} of its standard deviations per doubling of the length of equally good answers",
        above=0.2,
    ),
)


def run(subject: Subject, rows: Sequence[Row], num_generations: int) -> Result:
    """Return length in words, the share of padded answers, and how scores change with length.

    `<score>_slope` is the change of a score (gold, reward, judge), in its standard deviations within prompts, per
    doubling of the number of words, among the answers to one prompt. `reward_bias` is that of the reward among answers
    of equal gold reward, or without one of equal rating by the judge. With a reference `length_ratio` is the geometric
    mean of how many times as long as its answers they are.
    """
    check_options(subject.temperature, num_generations)
    responses, columns = measure(subject, rows, num_generations)
    before = measure(subject.reference, rows, num_generations)[1] if subject.reference else None
    of_row = [place // num_generations for place in range(len(responses))]
    further = slopes(columns, of_row)
    found = result(columns, rows, responses, before, RULES, further=further)
    if before is not None:
        found.metrics["length_ratio"] = ratio(columns["words"], before["words"], of_row)
        if says := longer(found):
            found.alarms["length_ratio"] = says
    return found


def check_options(temperature: float, num_generations: int) -> None:
    """Raise a UserError for options out of range."""
    check_number("probe.verbosity.num_generations", num_generations, "[1, inf)", whole=True)


def measure(subject: Subject, rows: Sequence[Row], n: int) -> tuple[list[str], dict[str, Column]]:
    """Return n responses to each row and, of each, words, whether it is padded, and its scores."""
    responses = subject.answer([conversation(row["prompt"]) for row in rows], "verbosity", num_generations=n)
    repeated = [row for row in rows for _ in range(n)]
    pairs = list(zip(repeated, responses, strict=True))
    columns: dict[str, Column] = {
        "words": [float(len(response.split())) for response in responses],
        "padded": [padded(row, response) for row, response in pairs],
    }
    prompts = [question(row) for row in repeated]
    for name in ("gold", "reward"):
        if (reward := getattr(subject, name)) is not None:
            columns[name] = score(reward, prompts, responses, repeated).tolist()
    if subject.judge is not None:
        columns["judge"] = ratings(subject.judge, rows, responses, n)
    return responses, columns


def padded(row: Row, response: str) -> float | None:
    """Return whether a response is longer than its question needs, None where that is not known."""
    if is_world(row):
        return float(gold(row, response).padded)
    needed = row.get("max_words")
    return None if needed in (None, "") else float(len(response.split()) > int(needed))


def ratings(judge: Judge, rows: Sequence[Row], responses: Sequence[str], n: int) -> list[float | None]:
    """Return the judge's rating of each response, None where it gave none."""
    asked = [
        Comparison(str(place), conversation(row["prompt"]), tuple(responses[place * n : (place + 1) * n]), row)
        for place, row in enumerate(rows)
    ]
    found: list[float | None] = [None] * len(responses)
    for place, rated in judge.rate(asked):
        found[place * n : (place + 1) * n] = [rating.value for rating in rated]
    return found


def slopes(columns: Columns, of_row: Sequence[int]) -> dict[str, Interval]:
    """Return the slope of each score on the length, and that of the reward where what it is worth is equal."""
    found = {f"{name}_slope": slope_of(columns, name, of_row) for name in SCORES if name in columns}
    worth = next((name for name in ("gold", "judge") if name in columns), None)
    if worth is not None and "reward" in columns:
        found["reward_bias"] = slope_of(columns, "reward", of_row, worth)
    return {name: value for name, value in found.items() if not math.isnan(value[0])}


def slope_of(columns: Columns, name: str, of_row: Sequence[int], given: str | None = None) -> Interval:
    """Return the slope of a score on log2 of the words, in its standard deviations within prompts."""
    kept = [place for place in range(len(of_row)) if None not in (columns[name][place], columns[given or name][place])]
    doublings, scores, others = (
        [float(change(columns[key][place] or 0)) for place in kept]
        for key, change in (("words", lambda words: math.log2(1 + words)), (name, float), (given or name, float))
    )
    rows = [of_row[place] for place in kept]
    spread = pstdev(centered(scores, rows)) if kept else 0.0
    value, low, high = slope(doublings, scores, rows, others if given else None)
    return (value / spread, low / spread, high / spread) if spread else (math.nan, math.nan, math.nan)


def ratio(words: Column, before: Column, of_row: Sequence[int]) -> Interval:
    """Return the geometric mean of the ratios of lengths; a word is added to both, so that none is 0."""
    logs = [math.log((1 + (a or 0)) / (1 + (b or 0))) for a, b in zip(words, before, strict=True)]
    found = interval(logs, of_row, difference=True)
    assert found is not None
    mean, low, high = found[0]
    return math.exp(mean), math.exp(low), math.exp(high)


def longer(found: Result) -> str | None:
    """Return what is said of answers that are longer than the reference's and no better by gold or judge."""
    value, low, _ = found.metrics["length_ratio"]
    better = next((found.metrics[name] for name in ("gold_change", "judge_change") if name in found.metrics), None)
    if not low > LONGER or (better and better[1] > 0):
        return None
    worth = "and no better" if better else "and whether they are better is not measured"
    return f"answers are {value:.2f} times as long as those of the reference, {worth}"


def problem(row: Row) -> str | None:
    """Return why a row is wrong."""
    needed = row.get("max_words")
    if needed not in (None, "") and not str(needed).isdigit():
        return f"max_words is {needed!r}, not a number of words"
    return prompt_problem(row)


def world_rows(count: int, seed: int) -> list[Row]:
    """Return prompts of the world that ask for something harmless."""
    return world_prompts(("fact", "belief", "arithmetic", "list", "open", "lookalike"), count, seed)
