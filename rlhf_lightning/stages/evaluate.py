"""`rlhf stage=evaluate`: the responses of each model to held-out prompts, and their rewards."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf_lightning.callbacks.loggers import log_table
from rlhf_lightning.callbacks.samples import as_markdown
from rlhf_lightning.callbacks.throughput import peak_memory_gb
from rlhf_lightning.data.datamodules import PreferenceData
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.tokenize import report_rows
from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.evaluation.baselines import Judgement, bag_of_words, longer
from rlhf_lightning.evaluation.comparing import RATING_COLUMNS, WIN_RATE_COLUMNS, Compared
from rlhf_lightning.evaluation.policy import Evaluation, evaluate_policy
from rlhf_lightning.evaluation.report.images import log_figures
from rlhf_lightning.evaluation.reward_model import TextPair, accuracies, text_pairs
from rlhf_lightning.evaluation.table import (
    BY_GROUP,
    COLUMNS,
    DIFFERENCES,
    HELD_OUT,
    HELD_OUT_PAIRS,
    PAIR_COLUMNS,
    RATINGS,
    WIN_RATES,
    as_markdown_table,
    attempt_columns,
    cells,
    group_columns,
    show,
)
from rlhf_lightning.files import write_json, write_jsonl
from rlhf_lightning.models.heads import RESERVED
from rlhf_lightning.models.loading import (
    is_classifier,
    load_causal_lm,
    load_tokenizer,
    resolve_model,
)
from rlhf_lightning.ops.statistics import Interval, as_metrics
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages.comparing import Plan, attempted, check_distinct, compare_all, plan, unrated, with_given
from rlhf_lightning.stages.reward_models import evaluate_reward_models


def run(run: Run) -> float | None:
    """Evaluate each model, write metrics.json and samples, and return the monitored metric of the last one."""
    began = time.perf_counter()
    options, cache = run.options, run.settings["paths"]["cache"]
    for key in ("rows", "num_generations", "max_new_tokens"):
        check_number(f"evaluate.{key}", options[key], "[1, inf)", whole=True)
    check_number("evaluate.temperature", options["temperature"], "[0, inf)")
    models = run.named_models()
    if not models and not options["answers"]:
        raise UserError("nothing to evaluate: give init_from=<folder> or evaluate.models.<name>=<folder>")
    reward_models = {name: folder for name, folder in models.items() if is_reward_model(folder)}
    policies = {name: folder for name, folder in models.items() if name not in reward_models}
    if not policies and (ensemble := run.settings["reward_ensemble"]) != "mean":
        raise UserError(f"reward_ensemble={ensemble} is of the rewards of responses, and no language model answers")
    made = plan(
        run, list(policies), answers=options["answers"], best_of=options["best_of"], pass_at=options["pass_at"],
        majority_at=options["majority_at"], against=options["against"], num_generations=options["num_generations"],
    )  # fmt: skip
    chosen = [f"{name}_bo{n}" for name in policies for n in made.best_of]
    check_distinct(models, list(made.given), chosen, BASELINES if reward_models else ())
    loggers = run.loggers()
    answered: dict[str, Evaluation] = {}
    compared_to = next(iter(made.given), "")
    table, evaluated = evaluate_reward_models(
        run,
        reward_models,
        partial(preferences, run),
        diagnostics=options["diagnostics"],
        source_column=options["source_column"],
        changed_rows=options["changed_rows"],
    )
    beaten = baselines(run, reward_models) if reward_models else {}
    if policies:
        reference = resolve_model(str(options["reference"] or next(iter(policies.values()))), cache)
        compared_to = next((name for name, folder in policies.items() if folder == reference), next(iter(policies)))
        answered = evaluations(run, policies, reference, made)
    answered, notes = with_given(made, answered, compared_to, options["rows"])
    evaluated += sum(len(answered[name].samples) for name in (*policies, *made.given))
    for name, answer in answered.items():
        table[name] = answer.intervals() | (attempted(made, answer) if name in (*policies, *made.given) else {})
        rows = answer.samples
        write_jsonl(run.folder / "samples" / f"{name}.jsonl", rows)
        for logger in loggers:
            log_table(logger, f"samples/{name}", rows[:16], "\n\n".join(map(as_markdown, rows[:16])), 0)
    comparison = compare_all(run, made, answered, compared_to)
    metrics, tables = figures(table, answered, compared_to, beaten, comparison)
    for logger in loggers:
        logger.log_metrics({name: metrics[name] for name in metrics if not name.endswith(("_low", "_high"))}, 0)
        for tag, titled in tables.items():
            header, *lines = cells(*titled[1:])
            lines = [dict(zip(header, line, strict=True)) for line in lines]
            log_table(logger, tag, lines, as_markdown_table(*titled), 0)
    last = next(reversed(policies or made.given or reward_models))
    metrics["monitor"] = f"{last}/{monitored(table[last], run.settings['monitor'])}"
    if len(models) + len(made.given) == 1:  # it needs no prefix
        metrics |= {key.partition("/")[2]: value for key, value in metrics.items() if key.startswith(f"{last}/")}
    metrics |= {
        "perf/peak_memory_gb": peak_memory_gb(),
        "perf/rows_per_s": evaluated / (time.perf_counter() - began),
    }
    write_json(run.folder / "metrics.json", metrics)
    log_figures(loggers, run.folder)
    for logger in loggers:
        logger.finalize("success")
    for title, rows, columns in tables.values():
        show(title, rows, columns=columns)
    for line in [*notes, *unrated(answered), *comparison.notes]:
        Console().print(line, style="yellow", markup=False, soft_wrap=True)
    Console().print(f"run         {run.folder}", soft_wrap=True)
    if reward_models and options["diagnostics"]:
        Console().print(f"tables      {run.folder / 'tables'}", soft_wrap=True)
    return metrics.get(metrics["monitor"])


def evaluations(run: Run, policies: dict[str, str], reference: str, made: Plan) -> dict[str, Evaluation]:
    """Return the responses of each policy and, as `<name>_bo<n>`, what `evaluate.best_of` makes of them."""
    options, load, answered = run.options, run.settings["model"]["load"], dict[str, Evaluation]()
    engine = run.build("sampler")
    for name, folder in policies.items():
        answered[name] = evaluate_policy(
            load_causal_lm(folder, **load),
            prompts(run, folder),
            engine,
            reference=partial(load_causal_lm, reference, **load),
            rewards=made.rewards,
            rows=options["rows"],
            num_generations=options["num_generations"],
            max_new_tokens=options["max_new_tokens"],
            temperature=options["temperature"],
            seed=run.settings["seed"],
            device=run.device,
            title=f"{name}: answers",
        )
        for n in made.best_of:
            answered[f"{name}_bo{n}"] = answered[name].best_of(n, to_reference=folder == reference)
    return answered


Shown = tuple[str, dict[str, dict[str, Interval]], Mapping[str, str]]
"""The title of a table, its rows, and its columns: metric -> title."""


def figures(
    table: dict[str, dict[str, Interval]],
    answered: dict[str, Evaluation],
    compared_to: str,
    beaten: dict[str, dict[str, Interval]],
    comparison: Compared,
) -> tuple[dict[str, Any], dict[str, Shown]]:
    """Return every mean and end of an interval by name, and what is shown of them.

    That is a table of the models, of their differences to one of them, of both by groups of people, of reward
    models beside the baselines `beaten`, and of win rates and ratings.
    """
    gaps = {
        f"{name}-{compared_to}": answer.minus(answered[compared_to])
        for name, answer in answered.items()
        if name != compared_to
    }
    metrics: dict[str, Any] = {}
    for name, row in chain((table | gaps | beaten).items(), comparison.figures.items()):
        for metric, value in row.items():
            metrics |= as_metrics(f"{name}/{metric}", value)
    tables: dict[str, Shown] = {}
    if answers := {name: table[name] for name in answered}:
        tables["evaluation"] = (HELD_OUT, answers, COLUMNS | attempt_columns(answers))
    if gaps:
        tables["differences"] = (DIFFERENCES.format(compared_to), gaps, COLUMNS)
    if beaten:
        reward_models = {name: row for name, row in table.items() if name not in answered}
        tables["pairs"] = (HELD_OUT_PAIRS, reward_models | beaten, PAIR_COLUMNS)
    if groups := groups_in(table, answered):
        tables["groups"] = (BY_GROUP, table | gaps, group_columns(groups))
    if comparison.shown:
        tables["win_rates"] = (WIN_RATES, comparison.shown, WIN_RATE_COLUMNS)
    if comparison.ratings:
        tables["ratings"] = (RATINGS, comparison.figures, RATING_COLUMNS)
    return metrics, tables


def groups_in(table: dict[str, dict[str, Interval]], answered: dict[str, Evaluation]) -> list[str]:
    """Return the names of the groups of people that any model was evaluated by."""
    names = [name for answer in answered.values() for members in answer.groups.values() for name in members]
    metrics = [metric for row in table.values() for metric in row]
    names += [metric.removeprefix("accuracy_") for metric in metrics if metric.startswith("accuracy_")]
    return [name for name in dict.fromkeys(names) if name not in RESERVED]


def is_reward_model(folder: str) -> bool:
    """Return whether a folder holds a sequence classifier, or the adapter of one."""
    return Path(folder).is_dir() and is_classifier(folder)


def prompts(run: Run, folder: str) -> Any:
    """Return the prompts tokenized for a model: the held-out ones, or the training ones where there are no others."""
    if run.settings["data"]["train"] is None and run.settings["data"]["val"] is None:
        raise UserError("a language model answers prompts: data.train=<file>, or data.val=<file>; data=world has some")
    data = run.data(folder, rows=True, **({"train": None} if run.settings["data"]["val"] is not None else {}))
    data.setup()
    report_rows(data)
    return data


NOT_OF_PAIRS = ("_target_", "ptx", "ptx_batch_size", "columns", "weights")
"""Settings of `data` that are about the prompts."""


BASELINES = ("longer", "bag_of_words")


def baselines(run: Run, models: Mapping[str, str]) -> dict[str, dict[str, Interval]]:
    """Return the accuracies of what the reward models have to beat, on the pairs that the first of them reads."""
    folder = next(iter(models.values()))
    pairs = pairs_of(preferences(run, folder))
    judgements: dict[str, Judgement] = {BASELINES[0]: longer}
    if (source := run.sources.get("evaluate.bag_of_words")) is not None:
        judgements[BASELINES[1]] = bag_of_words(pairs_of(preferences(run, folder, source)))
    return {name: accuracies(judge(pairs), pairs) for name, judge in judgements.items()}


def pairs_of(data: PreferenceData) -> list[TextPair]:
    """Return the pairs of all rows of `data` as texts."""
    return [pair for row in range(len(data.rows["val"])) for pair in text_pairs(data.group("val", row), data.template)]


def preferences(run: Run, folder: str, source: Source | None = None) -> PreferenceData:
    """Return the held-out preferences, or others, tokenized for a reward model."""
    source = source or run.sources.get("evaluate.preferences")
    if source is None:
        raise UserError(f"{folder} is a reward model; give held-out pairs with evaluate.preferences=<file or world>")
    options = {k: v for k, v in run.settings["data"].items() if k not in NOT_OF_PAIRS}
    data = PreferenceData(load_tokenizer(folder), **options | {"train": None, "val": source, "keep_rows": True})
    data.setup()
    return data


def monitored(row: dict[str, Interval], monitor: str) -> str:
    """Return the metric a sweep reads: the configured one, or the first of these that there is."""
    return next(m for m in (monitor, "gold", "reward", "accuracy", "length", "characters") if m in row)
