"""Evaluating a reward model on held-out preferences: its scores of their responses, and how many pairs it orders."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from rlhf_lightning.data.checks import ids_fit
from rlhf_lightning.data.datamodules import PreferenceData
from rlhf_lightning.data.records import RowError, preference
from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.models.completion import ScalarModel, choose_layout, unwrap, vocabulary_size
from rlhf_lightning.models.heads import heads
from rlhf_lightning.ops.groups import Group, Layout, microbatches
from rlhf_lightning.ops.ranking import pairs_in_order, ranked_pairs
from rlhf_lightning.ops.statistics import Interval, mean_interval, share_interval

BATCH_TOKENS = 8192
"""Tokens of a forward pass."""


@dataclass(frozen=True)
class TextPair:
    """The better and the worse response to a prompt, as texts."""

    prompt: Hashable
    better: str
    worse: str

    @property
    def better_is_shorter(self) -> bool:
        """Whether the better response has fewer characters."""
        return len(self.better) < len(self.worse)


def text_pairs(group: Group, template: Template) -> Iterator[TextPair]:
    """Yield the pairs of a ranking in the order of :func:`ranked_pairs`, as a model reads them: cut to max_length."""
    texts = [template.decode(response) for response in group.responses]
    ranks = torch.tensor(range(len(texts)) if group.ranks is None else group.ranks)
    for better, worse in zip(*ranked_pairs(ranks, torch.zeros_like(ranks)), strict=True):
        yield TextPair(tuple(group.prompt), texts[better], texts[worse])


@dataclass(frozen=True)
class ScoredRow:
    """K responses to a prompt and the scores that a reward model gives them.

    Args:
        number: of the row.
        prompt: its tokens; rows with the same prompt belong together.
        question: the prompt as text.
        responses: K texts, as the model reads them: cut to max_length.
        ranks: 0 the best.
        scores: normalized, of the head of the row's group, else the mean of all heads.
        logits: the scores as they were trained: of a difference of two sigma is the probability (Bradley-Terry).
        is_whole: no response is cut.
        margin: how much better the best response is, where the row says so.
        group: the group of annotators that ranked them.
        columns: the other columns of the row.
    """

    number: int
    prompt: Hashable
    question: str
    responses: Sequence[str]
    ranks: Sequence[int]
    scores: Sequence[float]
    logits: Sequence[float]
    is_whole: bool = True
    margin: float = 0.0
    group: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredPair:
    """Two responses of a row, by their places: the better and the worse one."""

    row: ScoredRow
    better: int
    worse: int

    @property
    def gap(self) -> float:
        """How far the better response scores higher."""
        return self.row.scores[self.better] - self.row.scores[self.worse]

    @property
    def logit(self) -> float:
        """The logarithm of the odds that the better response wins, by the model."""
        return self.row.logits[self.better] - self.row.logits[self.worse]

    @property
    def texts(self) -> TextPair:
        """The pair as texts."""
        return TextPair(self.row.prompt, self.row.responses[self.better], self.row.responses[self.worse])


def scored_pairs(rows: Sequence[ScoredRow]) -> list[ScoredPair]:
    """Return the untied pairs of every row."""
    found = []
    for row in rows:
        places = list(enumerate(row.ranks))
        found += [ScoredPair(row, i, j) for i, better in places for j, worse in places if better < worse]
    return found


def accuracies(gaps: Tensor, pairs: Sequence[TextPair]) -> dict[str, Interval]:
    """Return the accuracy, and as `shorter_accuracy` that of the pairs whose better response is the shorter one.

    The pairs of one prompt, whether of one ranking or of several rows, are not independent.

    Args:
        gaps: (P,) how far the better response of each pair scores higher; 0 counts half.
    """
    correct, prompts = pairs_in_order(gaps).tolist(), [pair.prompt for pair in pairs]
    table = {"accuracy": share_interval(correct, prompts)}
    if shorter := [place for place, pair in enumerate(pairs) if pair.better_is_shorter]:
        table["shorter_accuracy"] = share_interval([correct[i] for i in shorter], [prompts[i] for i in shorter])
    return table


class Scorer:
    """Scores the held-out rows of a data module with a reward model, and other responses to their prompts.

    A model with a head per group scores a row by the head of the group that the row names, by the mean of the
    normalized heads where it names none.

    Args:
        model: a sequence classifier of ours.
        data: a set-up data module with held-out rows.

    Raises:
        UserError: a row of a group that the model has no head for, or tokens that it has no embedding for.
    """

    def __init__(self, model: Any, data: PreferenceData, device: str = "cpu") -> None:
        ids_fit(data, "val", vocabulary_size(model))
        model.to(device).eval()
        self.layout: Layout = choose_layout(model)[0]
        self.scalar, self.data, self.device = ScalarModel(model), data, device
        self.heads = heads(model.config)
        std = getattr(unwrap(model).config, "reward_std", 1.0)
        self.std = torch.tensor(std if isinstance(std, list) else [std])

    def held_out(self, title: str = "scores") -> list[ScoredRow]:
        """Return every held-out row with its scores."""
        groups = [self.data.group("val", number) for number in range(len(self.data.rows["val"]))]
        columns = [head_of(group.annotators, self.heads, self.data, group.index) for group in groups]
        rows = []
        for group, column, table in zip(groups, columns, self.tables(groups, title), strict=True):
            longest = len(group.prompt) + max(map(len, group.responses))
            rows.append(
                ScoredRow(
                    number=group.index,
                    prompt=tuple(group.prompt),
                    question=self.data.template.decode(group.prompt),
                    responses=[self.data.template.decode(response) for response in group.responses],
                    ranks=list(range(len(group.responses)) if group.ranks is None else group.ranks),
                    scores=pick(table, column),
                    logits=pick(table * self.std, column),
                    is_whole=longest < self.data.max_length,
                    margin=group.margin,
                    group=group.annotators,
                    columns=group.metadata,
                )
            )
        return rows

    def rescore(self, changed: Sequence[tuple[ScoredRow, Sequence[str]]], title: str = "scores") -> list[list[float]]:
        """Return the normalized scores of other responses to the prompts of rows, each (row, texts).

        Raises:
            UserError: the data module does not keep its rows.
        """
        groups, columns = [], []
        for row, texts in changed:
            if not row.columns:
                raise UserError("responses are changed as texts, so PreferenceData(keep_rows=True) is needed")
            record = preference(dict(row.columns), self.data.columns)
            try:
                prompt, answers, _ = self.data.template.completions(record.prompt, list(texts), record.tools)
            except RowError as error:
                raise UserError(f"{self.data.where('val', [row.number])}, a changed response: {error}") from error
            room = max(self.data.max_length - len(prompt), 1)
            groups.append(Group(prompt, [answer[:room] for answer in answers], index=row.number))
            columns.append(head_of(row.group, self.heads, self.data, row.number))
        return [pick(table, column) for table, column in zip(self.tables(groups, title), columns, strict=True)]

    @torch.no_grad()
    def tables(self, groups: Sequence[Group], title: str) -> list[Tensor]:
        """Return the normalized scores (K, H) of the responses of each group by each head."""
        found: list[Tensor] = [torch.zeros(0)] * len(groups)
        bar = (
            TextColumn("  {task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
        )
        with Progress(*bar) as progress:
            task = progress.add_task(title, total=len(groups))
            longest = max((group.tokens for group in groups), default=1)
            for places, batch in microbatches(groups, BATCH_TOKENS, self.layout, 2 * longest):
                parts = self.scalar(batch.to(self.device)).cpu().view(batch.sequences, -1)
                sizes = [len(groups[place].responses) for place in places]
                for place, part in zip(places, parts.split(sizes), strict=True):
                    found[place] = part
                progress.advance(task, len(places))
        return found


def pick(table: Tensor, column: int | None) -> list[float]:
    """Return the scores (K,) of a table (K, H) by one head, by the mean of all where `column` is None."""
    return (table.mean(1) if column is None else table[:, column]).tolist()


def evaluate_reward_model(model: Any, data: PreferenceData, device: str = "cpu") -> tuple[dict[str, Interval], int]:
    """Return the accuracies on the held-out pairs of `data` with their intervals, and the number of pairs.

    Raises:
        UserError: see :class:`Scorer`.
    """
    pairs = scored_pairs(Scorer(model, data, device).held_out())
    return pair_accuracies(pairs), len(pairs)


def pair_accuracies(pairs: Sequence[ScoredPair]) -> dict[str, Interval]:
    """Return the accuracies of pairs; where rows name several groups, also of each, their mean and the worst."""
    gaps = torch.tensor([pair.gap for pair in pairs], dtype=torch.float64)
    correct, prompts = pairs_in_order(gaps).tolist(), [pair.row.prompt for pair in pairs]
    by_group = of_groups(correct, prompts, [pair.row.group for pair in pairs])
    return accuracies(gaps, [pair.texts for pair in pairs]) | by_group


def head_of(name: str | None, names: list[str], data: PreferenceData, row: int) -> int | None:
    """Return the head that orders the pairs of a row, None for the mean of all heads."""
    if name is None or not names:
        return None
    if name not in names:
        place = data.where("val", [row])
        raise UserError(f"{place}: the group {name!r} has no head, only {', '.join(names)}.{nearest(name, names)}")
    return names.index(name)


def of_groups(correct: Sequence[float], prompts: Sequence[Any], owners: Sequence[str | None]) -> dict[str, Interval]:
    """Return the accuracy of each group, the mean of these and the worst; nothing where rows name fewer than two."""
    table: dict[str, Interval] = {}
    names = sorted({name for name in owners if name is not None})
    if len(names) < 2:
        return {}
    counts = {name: owners.count(name) for name in names}
    for name in names:
        mine = [place for place, owner in enumerate(owners) if owner == name]
        table[f"accuracy_{name}"] = share_interval([correct[i] for i in mine], [prompts[i] for i in mine])
    owned = [place for place, owner in enumerate(owners) if owner is not None]
    # a mean over pairs whose weights give every group the same part
    weighted = [correct[i] * len(owned) / (len(names) * counts[str(owners[i])]) for i in owned]
    mean, low, high = mean_interval(weighted, [prompts[i] for i in owned])
    return table | {"accuracy_mean": (mean, max(low, 0.0), min(high, 1.0)), "accuracy_worst": min(table.values())}
