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
    "characters": "characters",
    "ended_with_eos": "ended",
    "refused_harmful": "refuses harmful",
    "over_refused": "over-refuses",
    "corrected": "corrects",
    "flattered": "flatters",
}
PAIR_COLUMNS = {
    "accuracy": "accuracy (95%)",
    "shorter_accuracy": "where the shorter response is better",
    "length_controlled_accuracy": "length-controlled",
    "length_spearman": "correlation with length",
    "calibration_error": "ECE",
    "brier": "Brier",
    "best_of_accuracy": "best of n",
    "reward_bench": "RewardBench 2",
    "format_flipped": "flipped by format",
    "ngrams_found": "n-grams found",
}
WITH_INTERVAL = (
    "gold",
    "gold_win_rate",
    "reward_win_rate",
    "accuracy",
    "shorter_accuracy",
    "length_controlled_accuracy",
    "best_of_accuracy",
    "shift",
    "win_rate",
    "length_controlled",
    "effect",
    "a",
    "b",
    "peak_reward",
    "lost_after_peak",
)
OF_GROUPS = ("gold", "reward", "accuracy")
"""Metrics that each group of people has a value of."""
DIGITS = {"length": 1, "characters": 1, "ngrams_found": 0, "wins": 0, "ties": 0, "losses": 0, "failed": 0}
HELD_OUT, HELD_OUT_PAIRS = "held-out prompts", "held-out pairs"
DIFFERENCES = "paired differences to {}"
WIN_RATES, RATINGS = "win rates", "ratings, Bradley-Terry on the scale of Elo (95%)"
BY_GROUP = "by group"


ATTEMPTS = ("pass", "majority")
"""How the names of metrics of several attempts begin: pass_at_4."""


def attempt_columns(table: Mapping[str, Mapping[str, Interval]]) -> dict[str, str]:
    """Return the columns of pass@k and majority@k that any model has: metric -> title."""
    names = dict.fromkeys(name for row in table.values() for name in row if name.partition("_at_")[0] in ATTEMPTS)
    return {name: name.replace("_at_", "@") + " (95%)" for name in names}


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
    of: str = "model",
) -> None:
    """Print `table`, model -> metric -> (mean, low, high), with those of `columns`, metric -> title, that any has.

    Args:
        of: what the rows are.
    """
    console = console or Console()
    header, *rows = cells(table, columns, of)
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


def cells(
    table: dict[str, dict[str, Interval]], columns: Mapping[str, str] = COLUMNS, of: str = "model"
) -> list[list[str]]:
    """Return the header and a row per model that has any of the columns."""
    known = [name for name in columns if any(name in row for row in table.values())]
    shown = {model: row for model, row in table.items() if any(name in row for name in known)}
    rows = [[model, *(cell(name, row.get(name)) for name in known)] for model, row in shown.items()]
    return [[of, *(columns[name] for name in known)], *rows]


def cell(name: str, value: Interval | None) -> str:
    """Return one cell."""
    if value is None:
        return ""
    mean, low, high = value
    if name.endswith("_rating"):
        return f"{mean:.0f} [{low:.0f}, {high:.0f}]" if math.isfinite(low) else f"{mean:.0f}"
    if (name in WITH_INTERVAL or name.partition("_")[0] in ("gold", "accuracy", *ATTEMPTS)) and math.isfinite(low):
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    return f"{mean:.{DIGITS.get(name, 3)}f}"
