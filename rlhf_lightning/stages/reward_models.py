"""The part of `rlhf stage=evaluate` that is about reward models: scores of held-out pairs, and diagnostics of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlhf_lightning.data.datamodules import PreferenceData
from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.evaluation.changes import format_changes, ngram_effects
from rlhf_lightning.evaluation.diagnostics import Diagnosis, diagnose
from rlhf_lightning.evaluation.reward_bench import reward_bench
from rlhf_lightning.evaluation.reward_model import ScoredRow, Scorer, pair_accuracies, scored_pairs
from rlhf_lightning.evaluation.table import show
from rlhf_lightning.files import write_jsonl
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.ops.statistics import Interval
from rlhf_lightning.runtime.run import Run

FORMAT_COLUMNS = {"shift": "shift of the score (95%)", "flipped": "pairs flipped", "overtaken": "worse one overtakes"}
NGRAM_COLUMNS = {"effect": "effect on the score (95%, simultaneous)"}


def evaluate_reward_models(
    run: Run,
    models: Mapping[str, str],
    preferences: Callable[[str], PreferenceData],
    *,
    diagnostics: bool = True,
    source_column: str | None = None,
    changed_rows: int = 0,
) -> tuple[dict[str, dict[str, Interval]], int]:
    """Return the metrics of each reward model and the number of pairs; write their samples and tables.

    Args:
        models: name -> folder.
        preferences: returns the held-out pairs, tokenized for a folder.
        diagnostics: more than the accuracy.
        source_column: says where a row comes from, see :func:`diagnose`.
        changed_rows: rows whose responses are changed and scored again.

    Raises:
        UserError: an option that is wrong or has no effect.
    """
    check_diagnostics(models, diagnostics, source_column, changed_rows)
    table: dict[str, dict[str, Interval]] = {}
    tables: dict[str, list[dict[str, Any]]] = {}
    evaluated = 0
    for name, folder in models.items():
        scorer = Scorer(load_scalar_model(folder, trained=True), preferences(folder), run.device)
        rows = scorer.held_out(f"{name}: scores")
        pairs = scored_pairs(rows)
        evaluated += len(pairs)
        write_jsonl(run.folder / "samples" / f"{name}.jsonl", samples(rows))
        found = Diagnosis()
        if diagnostics:
            found = diagnose(rows, source_column) | reward_bench(rows)
        if changed_rows:
            seed = run.settings["seed"]
            found |= format_changes(rows, scorer.rescore, changed_rows, seed)
            found |= ngram_effects(rows, scorer.rescore, responses=changed_rows, seed=seed)
        table[name] = pair_accuracies(pairs) | found.metrics
        for title, lines in found.tables.items():
            tables.setdefault(title, []).extend({"model": name} | line for line in lines)
        show_changes(name, found)
    for title, lines in tables.items():
        write_jsonl(run.folder / "tables" / f"{title}.jsonl", lines)
    return table, evaluated


def check_diagnostics(
    models: Mapping[str, str], diagnostics: bool, source_column: str | None, changed_rows: int
) -> None:
    """Raise a UserError for options that are wrong or have no effect."""
    check_number("evaluate.changed_rows", changed_rows, "[0, inf)", whole=True)
    for key, value in (("changed_rows", changed_rows), ("source_column", source_column)):
        if value and not models:
            raise UserError(f"evaluate.{key}={value} is of reward models, and none is evaluated")
        if value and not diagnostics:
            raise UserError(f"evaluate.{key}={value} is of the diagnostics: evaluate.diagnostics=true")


def samples(rows: list[ScoredRow]) -> list[dict[str, Any]]:
    """Return a line for every response: the number of its row, prompt, response, rank and score."""
    return [
        {"row": row.number, "prompt": row.question, "response": text, "rank": rank, "score": score}
        for row in rows
        for text, rank, score in zip(row.responses, row.ranks, row.scores, strict=True)
    ]


def show_changes(name: str, found: Diagnosis) -> None:
    """Print the tables of changed responses: all formats, and the n-grams that were found."""
    formats = {line["change"]: intervals(line, "shift") for line in found.tables.get("paraphrases", [])}
    ngrams = {line["ngram"]: intervals(line, "effect") for line in found.tables.get("ngrams", []) if line["found"]}
    if formats:
        show(f"{name}: changed formats", formats, columns=FORMAT_COLUMNS, of="format")
    if ngrams:
        show(f"{name}: n-grams that move the score", ngrams, columns=NGRAM_COLUMNS, of="n-gram")


def intervals(line: Mapping[str, Any], metric: str) -> dict[str, Interval]:
    """Return the numbers of a row of a table as intervals; `metric` has the ends `low` and `high`."""
    nan = float("nan")
    found = {key: (line[key], nan, nan) for key in ("flipped", "overtaken") if key in line}
    low, high = (nan if line[end] is None else line[end] for end in ("low", "high"))
    return {metric: (line[metric], low, high)} | found
