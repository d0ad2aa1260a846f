"""The printed comparison: a row per model, a column per metric."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from rich.console import Console
from rich.table import Table

from rlhf_lightning.ops.statistics import Interval

COLUMNS = {
    "gold": "gold reward (95%)",
    "gold_win_rate": "wins by gold",
    "reward": "reward model",
    "reward_win_rate": "wins by reward",
    "accuracy": "pair accuracy",
    "kl": "KL (nats)",
    "length": "tokens",
    "ended_with_eos": "ended",
    "refused_harmful": "refuses harmful",
    "over_refused": "over-refuses",
    "corrected": "corrects",
    "flattered": "flatters",
}
PAIR_COLUMNS = {"accuracy": "accuracy (95%)", "shorter_accuracy": "where the shorter response is better"}
WITH_INTERVAL = (
    "gold",
    "gold_win_rate",
    "reward_win_rate",
    "accuracy",
    "shorter_accuracy",
    "a",
    "b",
    "peak_reward",
    "lost_after_peak",
)
OF_GROUPS = ("gold", "reward", "accuracy")
"""Metrics that each group of people has a value of."""
HELD_OUT, HELD_OUT_PAIRS = "held-out prompts", "held-out pairs"
DIFFERENCES = "paired differences to {}"
BY_GROUP = "by group"


def group_columns(groups: Collection[str]) -> dict[str, str]:
    """Return the columns of the table of groups: metric -> title."""
    columns: dict[str, str] = {}
    for metric in OF_GROUPS:
        columns |= {f"{metric}_{name}": f"{metric}, {name}" for name in groups}
        columns |= {f"{metric}_mean": f"{metric}, mean", f"{metric}_worst": f"{metric}, worst group"}
    return columns


def show(
    title: str,
    table: dict[str, dict[str, Interval]],
    console: Console | None = None,
    columns: Mapping[str, str] = COLUMNS,
) -> None:
    """Print `table`, model -> metric -> (mean, low, high), with those of `columns`, metric -> title, that any has."""
    console = console or Console()
    header, *rows = cells(table, columns)
    printed = Table(title=title, show_lines=False)
    for number, name in enumerate(header):
        printed.add_column(name, justify="right" if number else "left")
    for row in rows:
        printed.add_row(*row)
    if console.width < 240 and not console.is_terminal:
        console = Console(file=console.file, width=240)  # a log is not folded
    console.print(printed)


def as_markdown_table(title: str, table: dict[str, dict[str, Interval]], columns: Mapping[str, str] = COLUMNS) -> str:
    """Return the same table as Markdown, for TensorBoard's text tab."""
    header, *rows = cells(table, columns)
    return f"**{title}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def cells(table: dict[str, dict[str, Interval]], columns: Mapping[str, str] = COLUMNS) -> list[list[str]]:
    """Return the header and a row per model that has any of the columns."""
    known = [name for name in columns if any(name in row for row in table.values())]
    shown = {model: row for model, row in table.items() if any(name in row for name in known)}
    rows = [[model, *(cell(name, row.get(name)) for name in known)] for model, row in shown.items()]
    return [["model", *(columns[name] for name in known)], *rows]


def cell(name: str, value: Interval | None) -> str:
    """Return one cell."""
    if value is None:
        return ""
    mean, low, high = value
    if (name in WITH_INTERVAL or name.partition("_")[0] in ("gold", "accuracy")) and math.isfinite(low):
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    return f"{mean:.1f}" if name == "length" else f"{mean:.3f}"
