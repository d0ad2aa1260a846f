"""The comparison shows a row a model and no column that nobody has."""

from __future__ import annotations

import io

from rich.console import Console

from rlhf_lightning.evaluation.table import (
    COLUMNS,
    HELD_OUT,
    WITH_INTERVAL,
    as_markdown_table,
    attempt_columns,
    cell,
    show,
)

TABLE = {
    "sft": {"gold": (0.1, 0.05, 0.15), "length": (7.25, 7.0, 7.5), "kl": (0.0, 0.0, 0.0)},
    "reward": {"accuracy": (0.95, 0.9, 0.98)},
}


def printed(width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(HELD_OUT, TABLE, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_rows_and_columns() -> None:
    lines = printed(140).splitlines()
    header = next(line for line in lines if "model" in line)
    assert "gold reward (95%)" in header
    assert "pair accuracy" in header
    assert "flatters" not in header
    sft, reward = ([cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│"))
    assert sft == ["sft", "0.100 [0.050, 0.150]", "", "0.000", "7.2"]
    assert reward == ["reward", "", "0.950 [0.900, 0.980]", "", ""]


def test_a_log_gets_one_line_a_model_even_with_every_column() -> None:
    console = Console(file=io.StringIO(), width=60)
    show(HELD_OUT, {name: dict.fromkeys(COLUMNS, (-0.123, -0.456, -0.789)) for name in ("sft", "ppo")}, console)
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith("│")]  # type: ignore[attr-defined]
    assert [line.count("]") for line in lines] == [len(COLUMNS.keys() & set(WITH_INTERVAL))] * 2


def test_the_same_table_in_markdown() -> None:
    assert as_markdown_table(HELD_OUT, TABLE).splitlines() == [
        "**held-out prompts**",
        "",
        "| model | gold reward (95%) | pair accuracy | KL (nats) | tokens |",
        "| --- | --- | --- | --- | --- |",
        "| sft | 0.100 [0.050, 0.150] |  | 0.000 | 7.2 |",
        "| reward |  | 0.950 [0.900, 0.980] |  |  |",
    ]


def test_cell() -> None:
    assert cell("kl", None) == ""
    assert cell("kl", (1.23456, 1, 2)) == "1.235"
    assert cell("length", (12.34, 1, 2)) == "12.3"
    assert cell("accuracy", (0.5, 0.4, 0.6)) == "0.500 [0.400, 0.600]"


def test_counts_ratings_and_attempts() -> None:
    assert cell("wins", (12.0, float("nan"), float("nan"))) == "12"
    assert cell("gold_rating", (1034.6, 1001.2, 1068.0)) == "1035 [1001, 1068]"
    assert cell("pass_at_8", (0.25, 0.1, 0.4)) == "0.250 [0.100, 0.400]"
    assert cell("length_controlled", (0.5, float("nan"), float("nan"))) == "0.500"
    assert attempt_columns(
        {"sft": {"gold": (0, 0, 0), "pass_at_8": (0, 0, 0)}, "ppo": {"majority_at_4": (0, 0, 0)}}
    ) == {
        "pass_at_8": "pass@8 (95%)",
        "majority_at_4": "majority@4 (95%)",
    }
