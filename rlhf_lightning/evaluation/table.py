"""The printed comparison: a row per model, a column per metric."""

from __future__ import annotations

import math
from collections.abc import Collection

from rich.console import Console
from rich.table import Table

from rlhf_lightning.ops.statistics import Interval

COLUMNS = {
    "gold": "gold reward (95%)",
    "reward": "reward model",
    "accuracy": "pair accuracy",
    "kl": "KL (nats)",
    "length": "tokens",
    "ended_with_eos": "ended",
    "refused_harmful": "refuses harmful",
    "over_refused": "over-refuses",
    "corrected": "corrects",
    "flattered": "flatters",
}
WITH_INTERVAL = ("gold", "accuracy")
BY_GROUP = ("gold", "reward", "accuracy")
"""Metrics that each group of people has a value of."""
HELD_OUT = "held-out prompts"
DIFFERENCES = "paired differences to {}"


def show(
    title: str, table: dict[str, dict[str, Interval]], console: Console | None = None, groups: Collection[str] = ()
) -> None:
    """Print `table`, model -> metric -> (mean, low, high), with the columns that any model has.

    Args:
        groups: names whose gold, reward and accuracy have columns of their own.
    """
    console = console or Console()
    header, *rows = cells(table, groups)
    printed = Table(title=title, show_lines=False)
    for number, name in enumerate(header):
        printed.add_column(name, justify="right" if number else "left")
    for row in rows:
        printed.add_row(*row)
    if console.width < 170 and not console.is_terminal:
        console = Console(file=console.file, width=170)  # a log is not folded
    console.print(printed)


def as_markdown_table(title: str, table: dict[str, dict[str, Interval]], groups: Collection[str] = ()) -> str:
    """Return the same table as Markdown, for TensorBoard's text tab."""
    header, *rows = cells(table, groups)
    return f"**{title}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def cells(table: dict[str, dict[str, Interval]], groups: Collection[str] = ()) -> list[list[str]]:
    """Return the header and a row per model."""
    titles: dict[str, str] = {}
    for column, title in COLUMNS.items():
        titles[column] = title
        titles |= {f"{column}_{name}": f"{column} of {name}" for name in groups if column in BY_GROUP}
        titles |= {f"{column}_worst": f"{column} of the worst group"} if column in BY_GROUP and groups else {}
    columns = [name for name in titles if any(name in row for row in table.values())]
    rows = [[model, *(cell(name, row.get(name)) for name in columns)] for model, row in table.items()]
    return [["model", *(titles[name] for name in columns)], *rows]


def cell(name: str, value: Interval | None) -> str:
    """Return one cell."""
    if value is None:
        return ""
    mean, low, high = value
    if name.partition("_")[0] in WITH_INTERVAL and math.isfinite(low):
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    return f"{mean:.1f}" if name == "length" else f"{mean:.3f}"
