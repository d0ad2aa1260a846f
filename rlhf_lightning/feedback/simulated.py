"""Simulated annotators: they compare responses to prompts of the built-in world by the values of their group."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_lightning.data.comparisons import Comparison, LabeledComparison
from rlhf_lightning.data.messages import RowError
from rlhf_lightning.data.records import prompt as read_prompt
from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.world.gold import WORD, row_problem
from rlhf_lightning.world.labeller import Labeller, check_shares, group_value, ranking, shown_values
from rlhf_lightning.world.prompts import Prompt, flawed

OF_RESPONSES = {
    "prompt",
    "messages",
    "responses",
    "ranking",
    "scores",
    "finished",
    "tokens",
    "id",
    "annotator",
    "group",
}
BETTER, MUCH_BETTER = 0.3, 1.5
"""Gaps of perceived value from which a response is called better, and much better, than slightly."""
WORDS_PER_SECOND, PAUSE = 4.0, 2.0
"""Reading speed, and the seconds that a decision takes besides."""


@dataclass(frozen=True)
class SimulatedAnnotator:
    """One annotator.

    Args:
        name: group and number, as "cautious-2".
        labeller: values and biases; its `noise` is the probability that two neighbors of the ranking change places.
        position_bias: added to the perceived value of the response that is shown first, in units of the gold reward;
            nothing is added to the last one.
        careless: ranks at random, in two seconds.
        ties: responses of equal value tie; otherwise chance decides.
    """

    name: str
    labeller: Labeller
    position_bias: float = 0.0
    careless: bool = False
    ties: bool = True

    def label(
        self, comparison: Comparison, row: dict[str, Any], rng: random.Random, check: int | None = None
    ) -> LabeledComparison:
        """Return the label of a comparison whose prompt is described by the columns of `row`."""
        size = len(comparison.responses)
        shown = rng.sample(range(size), size)
        values = [self.labeller.value(row, text, self.name) for text in comparison.responses]
        seen = shown_values(values, shown, self.position_bias)
        if self.careless:
            seen = [rng.random() for _ in seen]
        ranks = ranking(seen, self.labeller.noise, rng, self.ties)
        gap = abs(round(seen[0], 6) - round(seen[1], 6))
        strength = 0 if len(set(ranks)) == 1 else 1 + (gap >= BETTER) + (gap >= MUCH_BETTER)
        words = sum(len(WORD.findall(text)) for text in comparison.responses)
        seconds = (0 if self.careless else words / WORDS_PER_SECOND) + PAUSE
        return LabeledComparison(
            comparison, ranks, self.name, self.name.rpartition("-")[0],
            strength=strength if size == 2 else None, shown=tuple(shown),
            seconds=round(seconds * rng.lognormvariate(0, 0.3), 1), check=check,
        )  # fmt: skip


def population(
    annotators: int,
    groups: Mapping[str, float],
    *,
    noise: float = 0.0,
    position_bias: float = 0.0,
    length_bias: float = 0.0,
    careless: float = 0.0,
    ties: bool = True,
    seed: int = 0,
) -> list[SimulatedAnnotator]:
    """Return annotators of each group in proportion to its share, rounded by the largest remainder.

    Args:
        careless: share of annotators who rank at random.
        Others: see :class:`SimulatedAnnotator` and :class:`Labeller`.

    Raises:
        UserError: a number that cannot be, or a group whose share is not even one annotator.
    """
    check_number("simulate.annotators", annotators, "[1, inf)", whole=True)
    for name, value in (("noise", noise), ("careless", careless)):
        check_number(f"simulate.{name}", value, "[0, 1]")
    for name, value in (("position_bias", position_bias), ("length_bias", length_bias)):
        check_number(f"simulate.{name}", value, "(-inf, inf)")
    shares = check_shares(groups, "simulate.groups")
    counts = {group: int(share * annotators) for group, share in shares.items()}
    rest = sorted(shares, key=lambda group: counts[group] - shares[group] * annotators)
    for group in rest[: annotators - sum(counts.values())]:
        counts[group] += 1
    for group, count in counts.items():
        if not count:
            raise UserError(
                f"simulate.groups.{group}: {shares[group]:.3g} of {annotators} annotators is nobody; raise "
                "simulate.annotators"
            )
    names = [f"{group}-{number}" for group, count in counts.items() for number in range(count)]
    bad = set(random.Random(f"{seed}:careless").sample(names, round(careless * len(names))))
    return [
        SimulatedAnnotator(
            name, Labeller(noise=noise, length_bias=length_bias), position_bias, careless=name in bad, ties=ties
        )
        for name in names
    ]  # fmt: skip


def simulate(
    rows: Sequence[dict[str, Any]],
    annotators: Sequence[SimulatedAnnotator],
    *,
    labels: int = 3,
    size: int = 2,
    checks: float = 0.0,
    seed: int = 0,
    where: Callable[[int], str] = lambda number: f"row {number + 1}",
) -> Iterator[LabeledComparison]:
    """Yield the labels of all comparisons, a function of the arguments.

    The distinct responses of a row are dealt out at random into comparisons of `size`; those left over are not
    compared. `labels` annotators, drawn without replacement, label each of them.

    Args:
        rows: candidates: `prompt`, `responses` and the columns of the world's prompts.
        annotators: see :func:`population`.
        labels: labels per comparison.
        size: responses per comparison, from 2 for pairs to 9.
        checks: check questions per label, asked besides: an ideal response against one that every group likes less.
            An annotator gets none twice; there are 50.
        where: returns where a row stands, for messages.

    Raises:
        UserError: a row that is not the world's, no row with `size` distinct responses, more labels than annotators.
    """
    check_number("simulate.labels", labels, "[1, inf)", whole=True)
    check_number("simulate.size", size, "[2, 9]", whole=True)
    check_number("simulate.checks", checks, "[0, 1]")
    if labels > len(annotators):
        raise UserError(f"simulate.labels={labels} of each comparison need as many annotators, not {len(annotators)}")
    compared = [pair for number, row in enumerate(rows) for pair in comparisons(row, where(number), number, size, seed)]
    if not compared:
        raise UserError(f"no row has {size} distinct responses to compare (simulate.size={size})")
    questions = list(check_questions([row for row, _ in compared], annotators, seed)) if checks else []
    left = {a.name: random.Random(f"{seed}:{a.name}").sample(questions, len(questions)) for a in annotators}
    for row, comparison in compared:
        for annotator in random.Random(f"{seed}:{comparison.id}:who").sample(list(annotators), labels):
            rng = random.Random(f"{seed}:{comparison.id}:{annotator.name}")
            if left[annotator.name] and rng.random() < checks:
                asked, question, best = left[annotator.name].pop()
                yield annotator.label(question, asked, rng, best)
            yield annotator.label(comparison, row, rng)


def comparisons(
    row: dict[str, Any], where: str, number: int, size: int, seed: int
) -> Iterator[tuple[dict[str, Any], Comparison]]:
    """Yield the comparisons of a row of candidates, each with the row.

    Raises:
        UserError: the row has no responses, or it is not the world's.
    """
    texts = row.get("responses")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where} has no list of responses to compare; sample some with stage=candidates")
    if problem := row_problem(row):
        raise UserError(
            f"{where} is no row of the built-in world ({problem}), and only of those simulated annotators know what a "
            "response is worth; sample candidates with data=world"
        )
    try:
        content = read_prompt(row).content
    except RowError as error:
        raise UserError(f"{where}: {error}") from error
    assert isinstance(content, list)
    name = str(row.get("id", number))
    distinct = list({text.strip(): text for text in texts}.values())
    random.Random(f"{seed}:{name}:deal").shuffle(distinct)
    kept = {key: value for key, value in row.items() if key not in OF_RESPONSES}
    for part in range(len(distinct) // size):
        responses = tuple(distinct[part * size : (part + 1) * size])
        yield row, Comparison(f"{name}-{part}", content, responses, kept)


def check_questions(
    rows: Sequence[dict[str, Any]], annotators: Sequence[SimulatedAnnotator], seed: int, count: int = 50
) -> Iterator[tuple[dict[str, Any], Comparison, int]]:
    """Yield up to `count` questions with a known answer as (row, comparison, place of the ideal response)."""
    groups = {annotator.name.rpartition("-")[0] for annotator in annotators}
    left = count
    for row in {str(row.get("id")): row for row in rows}.values():
        record, rng = read_prompt(row), random.Random(f"{seed}:{row.get('id')}:check")
        prompt = Prompt(row["family"], record.text, row["ideal"], row["answer"], tuple(row["others"]), row["claim"],
                        row["count"])  # fmt: skip
        bad = flawed(prompt, "wrong", rng) or flawed(prompt, "refusing", rng)
        if bad is None or any(group_value(row, bad, g) >= group_value(row, prompt.ideal, g) for g in groups):
            continue
        best = rng.randrange(2)
        responses = (prompt.ideal, bad) if best == 0 else (bad, prompt.ideal)
        kept = {key: value for key, value in row.items() if key not in OF_RESPONSES}
        assert isinstance(record.content, list)
        yield row, Comparison(f"check-{row.get('id')}", record.content, responses, kept), best
        left -= 1
        if not left:
            return
