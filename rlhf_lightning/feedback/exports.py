"""What labels and aggregated rows are written as, beside the rows themselves: other formats and the data card."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from rlhf_lightning.data.comparisons import LabeledComparison
from rlhf_lightning.data.layouts import Row
from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback import card
from rlhf_lightning.feedback.aggregation import Aggregated, demonstrations
from rlhf_lightning.files import atomic_folder, atomic_path, write_jsonl

FORMATS = ("demonstrations", "datasets", "crowdkit")


def export(result: Aggregated, folder: Path, formats: Sequence[str]) -> list[str]:
    """Write the further `formats` of a result to `folder` and return a line about each.

    "demonstrations": demonstrations.jsonl, the best response of each comparison. "datasets": the rows as a folder that
    `datasets.load_from_disk` opens. "crowdkit": crowdkit.csv, the labels as a pairwise frame of crowd-kit.

    Raises:
        UserError: an unknown format, or rows that `datasets` cannot hold.
    """
    lines = []
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"aggregate.formats={name} is not one of {', '.join(FORMATS)}")
    if "demonstrations" in formats:
        rows = demonstrations(result.labels)
        write_jsonl(folder / "demonstrations.jsonl", rows)
        lines.append(f"demonstrations  {folder / 'demonstrations.jsonl'} ({len(rows)} rows)")
    if "datasets" in formats:
        write_dataset(folder / "dataset", result.rows)
        lines.append(f"datasets        {folder / 'dataset'} ({len(result.rows)} rows)")
    if "crowdkit" in formats:
        frame, ties = crowd_frame(result.labels.comparisons)
        write_csv(folder / "crowdkit.csv", frame)
        note = f", {ties} ties left out: crowd-kit has no ties" if ties else ""
        lines.append(f"crowdkit        {folder / 'crowdkit.csv'} ({len(frame)} rows{note})")
    return lines


def write_dataset(folder: Path, rows: Sequence[Row]) -> None:
    """Write rows as a folder of `datasets`, all or nothing."""
    import datasets

    datasets.disable_progress_bars()
    try:
        dataset = datasets.Dataset.from_list(list(rows))
        with atomic_folder(folder) as temporary:
            dataset.save_to_disk(str(temporary))
    except (TypeError, ValueError) as error:  # pyarrow's errors are these
        raise UserError(
            f"aggregate.formats: datasets cannot hold these rows, a column has several types ({str(error)[:120]})"
        ) from error
    finally:
        datasets.enable_progress_bars()


def crowd_frame(labels: Iterable[LabeledComparison]) -> tuple[list[Row], int]:
    """Return the labels as rows of a pairwise frame of crowd-kit, and the number of ties, which it cannot hold."""
    rows, ties = [], 0
    for label in labels:
        places = label.shown or range(len(label.ranking))
        for i, j in itertools.combinations(places, 2):
            if label.ranking[i] == label.ranking[j]:
                ties += 1
                continue
            texts = label.comparison.responses
            better = texts[i] if label.ranking[i] < label.ranking[j] else texts[j]
            row = {"task": label.comparison.id, "worker": label.annotator, "left": texts[i], "right": texts[j]}
            rows.append(row | {"label": better})
    return rows, ties


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows with the same columns as CSV, atomically."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["task", "worker", "left", "right", "label"])
        writer.writeheader()
        writer.writerows(rows)


# ---- the data card ---------------------------------------------------------------------------------------------------


def data_card(result: Aggregated, source: str, agreement: Sequence[str] = ()) -> str:
    """Return the data card in Markdown, with the YAML head of the hub: who labeled what, and how it was aggregated.

    Args:
        source: where the labels were read from.
        agreement: lines about how far annotators agree.
    """
    labels = result.labels
    people = Counter(label.annotator for label in labels)
    groups = Counter(str(label.group or "none given") for label in labels)
    items = len({label.comparison.id for label in labels.comparisons})
    per_item = Counter(Counter(label.comparison.id for label in labels.comparisons).values())
    timed = [label.seconds for label in labels if label.seconds is not None]
    dates = sorted(label.time[:10] for label in labels.comparisons if label.time)
    layouts = ", ".join(f"{name} ({count} rows)" for name, count in labels.layouts.items())
    facts = [
        ("Source", source),
        ("Layout", layouts or "labels"),
        ("Labels", f"{len(labels)} by {len(people)} annotators, of {items} comparisons"),
        ("Labels per comparison", ", ".join(f"{n}: {count}" for n, count in sorted(per_item.items()))),
        ("Dates", f"{dates[0]} to {dates[-1]}" if dates else "not recorded"),
        ("Time", f"median {median(timed):.0f} seconds per label" if timed else "not recorded"),
        ("Aggregation", f"{result.method}{', every group alone' if result.by_group else ''}"),
        ("Rows", len(result.rows)),
        ("License", "fill in, here and in the head of this file"),
        ("Instructions to the annotators, their pay and consent", "fill in"),
    ]
    left_out = [(f"{count} comparisons", reason) for reason, count in result.dropped.items()]
    left_out += [(f"{count} rows or labels", reason) for reason, count in labels.left_out.items()]
    sections = {
        "Annotators": card.table(["annotator", "labels"], people.most_common()),
        "Groups": card.table(["group", "labels"], groups.most_common()),
        "Agreement": list(agreement) or ["Not computed: `rlhf stage=agreement` does."],
        "Left out": card.bullets(left_out),
    }
    return card.data_card(facts, sections, ["license: unknown", "tags: [preference, rlhf]"])
