"""Labels of several annotators made into rows to train on, by a rule that the user chooses."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_lightning.data.comparisons import Comparison, LabeledComparison
from rlhf_lightning.data.layouts import Row
from rlhf_lightning.errors import UserError, check_number, nearest
from rlhf_lightning.feedback.reading import Labels, read_labels
from rlhf_lightning.feedback.reliability import MODELS, Reliability
from rlhf_lightning.feedback.units import entries, sign

METHODS = ("majority", "soft", "reliability", "none")
EQUAL = "as many votes for one response as for the other"
Shares = dict[tuple[int, int], float]
"""Places of two responses, the first smaller -> share of the votes, or probability, that the first one is better."""


@dataclass
class Aggregated:
    """Rows to train on, and what became of the labels.

    Args:
        rows: preference rows or rankings; with the method "none" a row per label.
        labels: the labels they come from.
        method: how they were aggregated.
        by_group: every group's labels were aggregated alone.
        dropped: reason -> how many comparisons gave no row.
        reliability: group -> the model of its annotators, where one was used; None for all annotators.
    """

    rows: list[Row]
    labels: Labels
    method: str
    by_group: bool = False
    dropped: Counter[str] = field(default_factory=Counter)
    reliability: dict[str | None, Reliability] = field(default_factory=dict)


def aggregate(
    labels: Any,
    method: str = "majority",
    *,
    by_group: bool = False,
    reliability: str = "dawid_skene",
    min_labels: int = 1,
) -> Aggregated:
    """Return rows to train on from labels of comparisons.

    Of every two responses a label is a vote for the better one, and a tie half a vote for each. Empty responses, and
    those that repeat another, are left out. A comparison whose best response is known (`check`) gives no row.

    Args:
        labels: anything that :func:`read_labels` takes.
        method: "majority": the response with more votes is chosen; of more than two responses a ranking by the number
            of others that each beats (Copeland), which may have ties. "soft": the `label` of a preference row is the
            share of votes for its chosen response, 0.5 to 1; a row for every two responses. "reliability": the same
            with the probability by a model of annotators in place of the share. "none": a row for every label.
        by_group: aggregate the labels of every group of annotators alone, into rows with the column `group`.
        reliability: "dawid_skene" or "bradley_terry", the model of the method "reliability".
        min_labels: labels that a comparison needs, with `by_group` of each group.

    Raises:
        UserError: an unknown method, labels of single items, or no row.
    """
    check_choice("method", method, METHODS)
    check_choice("reliability", reliability, tuple(MODELS))
    check_number("aggregate.min_labels", min_labels, "[1, inf)", whole=True)
    labels = read_labels(labels)
    if not labels.comparisons:
        raise UserError("these are labels of single responses; only comparisons can be made into preferences")
    result = Aggregated([], labels, method, by_group and method != "none")
    if method == "none":
        result.rows = [label.row() for label in labels.comparisons]
        return result
    for group, members in parts(labels.comparisons, by_group, result.dropped).items():
        if method == "reliability":
            result.reliability[group] = fitted(reliability, members, group)
        for votes in by_comparison(members):
            made, reason = aggregated(votes, method, result.reliability.get(group), min_labels)
            if reason:
                result.dropped[reason] += 1
            result.rows += [row | ({"group": group} if by_group else {}) for row in made]
    if not result.rows:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in result.dropped.items())
        raise UserError(f"no comparison gives a row ({reasons})")
    return result


def fitted(name: str, labels: list[LabeledComparison], group: str | None) -> Reliability:
    """Return a model of the annotators of these labels."""
    try:
        return MODELS[name](entries(Labels(labels)))
    except UserError as error:
        raise UserError(str(error) if group is None else f"group {group!r}: {error}") from None


def check_choice(key: str, value: str, options: Sequence[str]) -> None:
    """Raise a UserError unless an option of `aggregate` is one of `options`."""
    if value == "group":
        raise UserError(f"aggregate.{key}=group: aggregate.by_group=true aggregates every group alone, by any method")
    if value not in options:
        raise UserError(f"aggregate.{key}={value} is not one of {', '.join(options)}.{nearest(str(value), options)}")


def parts(
    labels: Sequence[LabeledComparison], by_group: bool, dropped: Counter[str]
) -> dict[str | None, list[LabeledComparison]]:
    """Return the labels of each group, in the order of their names; those without a group are counted as dropped."""
    if not by_group:
        return {None: list(labels)}
    groups: dict[str, list[LabeledComparison]] = {}
    for label in labels:
        if label.group is not None:
            groups.setdefault(label.group, []).append(label)
        else:
            dropped["labels of annotators without a group"] += 1
    if not groups:
        raise UserError("aggregate.by_group=true: no label has a group; data.columns cannot name one, `group` is read")
    return {name: groups[name] for name in sorted(groups)}


def by_comparison(labels: Sequence[LabeledComparison]) -> Iterator[list[LabeledComparison]]:
    """Yield the labels of each comparison, in the order in which comparisons come first."""
    members: dict[str, list[LabeledComparison]] = {}
    for label in labels:
        members.setdefault(label.comparison.id, []).append(label)
    yield from members.values()


def aggregated(
    votes: Sequence[LabeledComparison], method: str, model: Reliability | None, min_labels: int
) -> tuple[list[Row], str | None]:
    """Return the rows of the labels of one comparison, and why there is none."""
    comparison = votes[0].comparison
    used = distinct(comparison)
    if any(vote.check is not None for vote in votes):
        return [], "check questions"
    if not comparison.prompt:
        return [], "no prompt"
    if len(used) < 2:
        return [], "a response is empty, or both are the same"
    if len(votes) < min_labels:
        return [], f"fewer than {min_labels} labels"
    shares = vote_shares(votes, used) if model is None else model_shares(comparison, model, used)
    shared = {**comparison.metadata, "id": comparison.id, "prompt": comparison.prompt}
    count = {"votes": len(votes)}
    if method == "majority" and len(used) > 2:
        ranks = copeland(shares, used)
        if len(set(ranks)) == 1:
            return [], EQUAL
        return [shared | {"responses": [comparison.responses[i] for i in used], "ranking": ranks} | count], None
    rows = []
    for (i, j), share in shares.items():
        if share == 0.5 and method == "majority":
            continue
        chosen, rejected, label = (i, j, share) if share >= 0.5 else (j, i, 1 - share)
        row = shared | {"chosen": comparison.responses[chosen], "rejected": comparison.responses[rejected]}
        rows.append(row | ({} if method == "majority" else {"label": label}) | count)
    return rows, None if rows else EQUAL


def distinct(comparison: Comparison) -> list[int]:
    """Return the places of responses that are not empty and differ from those before them."""
    texts = [text.strip() for text in comparison.responses]
    return [i for i, text in enumerate(texts) if text and text not in texts[:i]]


def vote_shares(votes: Sequence[LabeledComparison], used: Sequence[int]) -> Shares:
    """Return the share of votes for the first of every two responses, a tie being half a vote."""
    return {
        (i, j): sum(0.5 - 0.5 * sign(vote, i, j) for vote in votes) / len(votes)
        for i, j in itertools.combinations(used, 2)
    }


def model_shares(comparison: Comparison, model: Reliability, used: Sequence[int]) -> Shares:
    """Return the probability that the first of every two responses is better; that of a tie is halved."""
    shares = {}
    for i, j in itertools.combinations(used, 2):
        known = model.posterior[comparison.id, i, j]
        shares[i, j] = known.get(-1, 0.0) + 0.5 * known.get(0, 0.0)
    return shares


def copeland(shares: Shares, used: Sequence[int]) -> list[int]:
    """Return the rank of each response by how many others it beats, a draw counting half."""
    wins = dict.fromkeys(used, 0.0)
    for (i, j), share in shares.items():
        first = 0.5 if share == 0.5 else float(share > 0.5)
        wins[i] += first
        wins[j] += 1 - first
    levels = sorted(set(wins.values()), reverse=True)
    return [levels.index(wins[i]) for i in used]


def demonstrations(labels: Labels) -> list[Row]:
    """Return the best response of each comparison by majority, as rows for SFT.

    A comparison without one best response gives none, nor does one whose best response most annotators who were asked
    call unacceptable.
    """
    rows = []
    for votes in by_comparison(labels.comparisons):
        comparison, used = votes[0].comparison, distinct(votes[0].comparison)
        if len(used) < 2 or not comparison.prompt or any(vote.check is not None for vote in votes):
            continue
        ranks = copeland(vote_shares(votes, used), used)
        best = used[ranks.index(0)]
        asked = [vote.acceptable[best] for vote in votes if vote.acceptable is not None]
        if ranks.count(0) == 1 and 2 * sum(asked) >= len(asked):
            row = comparison.metadata | {"id": comparison.id, "prompt": comparison.prompt}
            rows.append(row | {"response": comparison.responses[best]})
    return rows
