"""Labels from rows, in our own layout, in the layouts of data sets and in those of other tools, made into one list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_lightning.data import records
from rlhf_lightning.data.comparisons import Comparison, ItemLabel, LabeledComparison, digest
from rlhf_lightning.data.layouts import Canonical, Columns, Row, has_value, listed, read_row
from rlhf_lightning.data.messages import LeftOut, RowError, need_list
from rlhf_lightning.data.sources import Source, read_source
from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.importers import (
    Label,
    annotated_pair,
    annotated_response,
    arena,
    crowd_labels,
    crowd_pairwise,
    group_of,
    id_of,
    label_studio,
    label_studio_min,
    metadata,
    min_results,
    need_annotator,
    number,
)


@dataclass
class Labels:
    """Labels of comparisons and of single items, and what was left out.

    Args:
        comparisons: of each id all have the same :class:`Comparison`, with its responses in one order.
        items: labels of single items.
        left_out: reason -> how many rows or annotations.
        layouts: layout of rows -> how many rows had it.
    """

    comparisons: list[LabeledComparison] = field(default_factory=list)
    items: list[ItemLabel] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.comparisons) + len(self.items)

    def __iter__(self) -> Any:
        yield from self.comparisons
        yield from self.items

    def only(self, keep: Callable[[Label], bool]) -> Labels:
        """Return those that are kept."""
        return Labels([x for x in self.comparisons if keep(x)], [x for x in self.items if keep(x)])


@dataclass(frozen=True)
class LabelLayout:
    """A layout of rows with labels: its name, the columns it needs, what else must hold, and its reader."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[Row, Columns], list[Label | LeftOut]]
    when: Callable[[Row], bool] = lambda row: True


def ranking_label(row: Row, columns: Columns) -> list[Label | LeftOut]:
    """Read a row of ours: `responses`, one rank for each in `ranking`, `annotator`, and what else is known."""
    prompt = records.prompt_of(row, columns)
    responses, ranks = records.ranked(row, columns, blank=True)
    places = range(len(responses))
    shown = None if row.get("shown") is None else tuple(need_list(row["shown"], "shown"))
    if shown is not None and not (all(type(place) is int for place in shown) and sorted(shown) == list(places)):
        raise RowError(f"shown is {row['shown']}, not an order of the {len(responses)} responses")
    check = row.get("check")
    if check is not None and (type(check) is not int or check not in places):
        raise RowError(f"check is {check!r}, not the index of one of {len(responses)} responses")
    acceptable = row.get("acceptable")
    if acceptable is not None and (not isinstance(acceptable, list) or len(acceptable) != len(responses)):
        raise RowError(f"acceptable is {str(acceptable)[:40]}, not true or false for each response")
    return [
        LabeledComparison(
            Comparison(id_of(row, digest(prompt, responses)), prompt, tuple(responses), metadata(row)),
            tuple(ranks), need_annotator(row), group_of(row), strength_of(row), shown,
            number(row.get("seconds"), "seconds"), str(row["time"]) if has_value(row.get("time")) else None, check,
            None if acceptable is None else tuple(map(bool, acceptable)),
        )
    ]  # fmt: skip


def preference_label(row: Row, columns: Columns) -> list[Label | LeftOut]:
    """Read a preference row with an annotator, in any layout of :mod:`rlhf_lightning.data.layouts`.

    The order of its responses says who won, so they are listed in an order of their texts.
    """
    record = records.preference(row, columns)
    if isinstance(record.prompt, str):
        raise RowError("the prompt is no conversation")
    order = sorted(range(len(record.responses)), key=lambda i: digest([], [record.responses[i]]))
    responses = tuple(record.responses[i] for i in order)
    comparison = Comparison(id_of(row, digest(record.prompt, responses)), record.prompt, responses, metadata(row))
    return [
        LabeledComparison(
            comparison, tuple(record.ranks[i] for i in order), need_annotator(row), group_of(row), strength_of(row),
            seconds=number(row.get("seconds"), "seconds"),
            time=str(row["time"]) if has_value(row.get("time")) else None,
        )
    ]  # fmt: skip


def strength_of(row: Row) -> int | None:
    """Return how much better the better response is, None where it is not known."""
    value = row.get("strength")
    value = int(value) if isinstance(value, str) and value in ("0", "1", "2", "3") else value  # of a CSV file
    if has_value(value) and (isinstance(value, bool) or value not in (0, 1, 2, 3)):
        raise RowError(
            f"strength is {str(value)[:40]!r}; it is 0 for a tie, 1 slightly better, 2 better, 3 much better"
        )
    return int(value) if has_value(value) else None  # type: ignore[arg-type]


def is_studio(row: Row) -> bool:
    """Return whether `annotations` are those of Label Studio."""
    return isinstance(row["annotations"], list) and all(
        isinstance(x, dict) and "result" in x for x in row["annotations"]
    )


def has_min_result(row: Row) -> bool:
    """Return whether a column holds the result of a tag of Label Studio."""
    return bool(min_results(row))


LAYOUTS = (
    LabelLayout("Label Studio JSON", ("data", "annotations"), label_studio, is_studio),
    LabelLayout("Label Studio JSON-MIN", ("annotator", "annotation_id"), label_studio_min, has_min_result),
    LabelLayout("Chatbot Arena votes", ("winner", "conversation_a", "conversation_b"), arena),
    LabelLayout("pairs with annotations", ("prompt", "response_a", "response_b", "annotations"), annotated_pair),
    LabelLayout("responses with annotations", ("prompt", "response", "annotations"), annotated_response),
    LabelLayout("crowd-kit pairwise", ("worker", "left", "right", "label"), crowd_pairwise),
    LabelLayout("crowd-kit labels", ("task", "worker", "label"), crowd_labels),
    LabelLayout("labels", ("prompt", "responses", "ranking"), ranking_label),
)  # fmt: skip
"""In the order in which they are tried; preference rows come last."""


def labels_of(row: Any, columns: Columns) -> tuple[str, list[Label | LeftOut]]:
    """Return the name of a row's layout and its labels.

    Raises:
        RowError: what is wrong with the row, or with which layouts its columns were compared.
    """
    view = Canonical(columns.view(row))
    for layout in LAYOUTS:
        if all(name in view and view[name] is not None for name in layout.needs) and layout.when(view):
            return layout.name, layout.read(view, columns)
    if read_row(view, columns, ("pair",))[0] is None:
        needs = "; ".join(f"{layout.name}: {', '.join(layout.needs)}" for layout in LAYOUTS)
        raise RowError(f"no layout of labels has its columns: {listed(view)}. They are preferences: annotator; {needs}")
    return "preferences", preference_label(view, columns)


def read_labels(
    source: Any, columns: Columns | Mapping[str, Any] | None = None, on_bad_row: str = "error", name: str = "train"
) -> Labels:
    """Return the labels of a source, each comparison once and each annotator's last label of it.

    Args:
        source: a path, pattern, folder or hub name as for :func:`read_source`, a :class:`Source`, a list of rows, a
            pandas DataFrame, labels, or a list of labels.
        columns: the data's names of columns, see :class:`Columns`.
        on_bad_row: "error" raises at the first bad row, "skip" counts it.
        name: the key below `data` that the source comes from, for messages.

    Raises:
        UserError: naming the file and the row, or when there is no label.
    """
    if isinstance(source, Labels):
        return source
    if on_bad_row not in ("error", "skip"):
        raise UserError(f"data.on_bad_row={on_bad_row!r} is not one of: error, skip")
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        source = [{k: v for k, v in row.items() if v == v} for row in source.to_dict("records")]  # NaN is no value
    if (
        isinstance(source, list | tuple)
        and source
        and all(isinstance(x, LabeledComparison | ItemLabel) for x in source)
    ):
        return gathered((("label", label) for label in source), "labels", on_bad_row)
    read = (
        source if isinstance(source, Source) else read_source(source if isinstance(source, list) else str(source), name)
    )
    layouts: Counter[str] = Counter()
    columns = columns if isinstance(columns, Columns) else Columns(columns)

    def entries() -> Iterable[tuple[str, Label | RowError]]:
        for where, row in read.rows():
            try:
                layout, labels = labels_of(row, columns)
            except RowError as error:
                yield where, error
                continue
            layouts[layout] += 1
            yield from ((where, label) for label in labels)

    labels = gathered(entries(), read.name, on_bad_row)
    labels.layouts = layouts
    return labels


def gathered(entries: Iterable[tuple[str, Label | RowError]], name: str, on_bad_row: str) -> Labels:
    """Return labels with one :class:`Comparison` per id, and of several labels of one annotator the last.

    Raises:
        UserError: a bad row, unless `on_bad_row` is "skip"; or no label.
    """
    labels, first, kept = Labels(), dict[str, Comparison](), dict[tuple[type, str, str], Label]()
    for where, label in entries:
        if isinstance(label, LabeledComparison):
            try:
                label = label.aligned(first.setdefault(label.comparison.id, label.comparison))
            except ValueError:
                label = RowError(f"the comparison {label.comparison.id!r} has other responses than in an earlier row")
        if isinstance(label, RowError):
            if on_bad_row == "error" and not isinstance(label, LeftOut):
                raise UserError(f"{name}, {where}: {label}") from None
            labels.left_out[str(label).split(";")[0]] += 1
            continue
        item = label.comparison.id if isinstance(label, LabeledComparison) else label.id
        if kept.pop((type(label), item, label.annotator), None) is not None:
            labels.left_out["an earlier label of the same annotator for the same item"] += 1
        kept[type(label), item, label.annotator] = label
    labels.comparisons = [x for x in kept.values() if isinstance(x, LabeledComparison)]
    labels.items = [x for x in kept.values() if isinstance(x, ItemLabel)]
    if not len(labels):
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in labels.left_out.items())
        raise UserError(f"{name} has no label ({reasons or 'it is empty'})")
    return labels
