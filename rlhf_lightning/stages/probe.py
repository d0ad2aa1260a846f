"""`rlhf stage=probe`: what RLHF did to a model, measured by probes."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.evaluation.probes import PROBES
from rlhf_lightning.evaluation.probes.probe import Result, Row, Subject
from rlhf_lightning.evaluation.probes.rows import read_rows
from rlhf_lightning.evaluation.probes.running import (
    GIVE,
    as_rows,
    check_needs,
    check_settings,
    check_used,
    load_subject,
    run_probe,
    show,
)
from rlhf_lightning.evaluation.report.images import log_figures
from rlhf_lightning.files import fingerprint, read_json, write_json, write_jsonl
from rlhf_lightning.judges.judge import Judge
from rlhf_lightning.judges.table import load_judge
from rlhf_lightning.models.loading import is_classifier, resolve_model
from rlhf_lightning.ops.statistics import Interval
from rlhf_lightning.runtime.run import Run


def run(run: Run) -> float | None:
    """Run the chosen probes on each model, write what they measured, and return the monitored metric."""
    options = run.options
    names = [name for name in PROBES if name in options]
    if not names:
        raise UserError(f"choose what to measure: probe= one of {', '.join(PROBES)}, or all")
    check_number("probe.max_new_tokens", options["max_new_tokens"], "[1, inf)", whole=True)
    check_number("probe.temperature", options["temperature"], "[0, inf)")
    if options["rows"] is not None:
        check_number("probe.rows", options["rows"], "[1, inf)", whole=True)
    if unread := [key for key in ("train", "val") if run.settings["data"][key] is not None]:
        raise UserError(f"stage={run.stage.name} reads probe.data (world, or a file), not data.{unread[0]}")
    data = options["data"]
    if data not in (None, "world"):
        if len(names) > 1:
            raise UserError(f"probe.data={data} has the columns of one probe, and {len(names)} are chosen")
        data = run.sources["probe.data"]
    models = run.named_models()
    if not models:
        raise UserError("nothing to probe: give init_from=<folder> or probe.models.<name>=<folder>")
    given = {"gold": run.settings["gold_from"], "reward": run.settings["reward_from"], "judge": run.judge}
    given |= {"reference": options["reference"]}
    probes, has = [PROBES[name] for name in names], {need for need in GIVE if given[need]}
    check_used(probes, has)
    for probe in probes:  # before any work
        check_needs(probe, has)
        check_settings(probe, options[probe.name], options["temperature"])
        read_rows(probe, data, options["rows"], run.settings["seed"])
    reference = [reference_folder(run)] if options["reference"] else []
    if wrong := next((folder for folder in [*models.values(), *reference] if is_classifier(folder)), None):
        raise UserError(f"{wrong} is a reward model; probes ask language models")
    judge = load_judge(run.judge) if run.judge else None
    if hasattr(judge, "to"):
        judge.to(run.device)  # type: ignore[union-attr]
    load = loader(run, judge)
    with contextlib.closing(judge) if judge else contextlib.nullcontext(), bar(len(models) * len(names)) as moves:
        advance, inside = moves
        results = measured(
            run.folder / "parts",
            models,
            names,
            lambda model: load(models[model], progress=inside(model)),
            lambda name, subject: run_probe(name, subject, data, options["rows"], options[name]),
            advance,
        )
    return written(run, models, results)


def measured(
    parts: Path,
    models: Iterable[str],
    probes: Sequence[str],
    load: Callable[[str], Any],
    measure: Callable[[str, Any], Result],
    advance: Callable[[], Any] = lambda: None,
) -> dict[tuple[str, str], Result]:
    """Return the result of each probe of each model; what an interrupted run has left in `parts` is not measured again.

    Args:
        load: returns the subject of a model; a model of which all is known is not loaded.
        measure: returns what a probe, by name, measures of a subject.
        advance: called after each result.
    """
    results: dict[tuple[str, str], Result] = {}
    for model in models:
        subject = None
        for name in probes:
            part = parts / f"{fingerprint([model, name])[:16]}.json"
            found = kept(part)
            if found is None:
                subject = subject or load(model)
                found = measure(name, subject)
                write_json(part, as_json(found))
            results[model, name] = found
            advance()
    return results


def loader(run: Run, judge: Judge | None) -> Callable[..., Subject]:
    """Return the function that loads a model with what the configuration says that it is measured with."""
    options, reference = run.options, run.options["reference"]
    load = partial(
        load_subject,
        engine=run.build("sampler"),
        template=run.settings["data"]["template"],
        load=run.settings["model"]["load"],
        device=run.device,
        gold=run.reward("gold_from"),
        reward=run.reward("reward_from"),
        judge=judge,
        max_new_tokens=options["max_new_tokens"],
        temperature=options["temperature"],
        seed=run.settings["seed"],
    )
    if not reference:
        return load
    return partial(load, reference=cache(partial(load, reference_folder(run), remember=True)))  # one for all models


def reference_folder(run: Run) -> str:
    """Return the folder of the reference."""
    return resolve_model(str(run.options["reference"]), run.settings["paths"]["cache"])


def written(run: Run, models: dict[str, str], results: dict[tuple[str, str], Result]) -> float | None:
    """Write what was measured, print it, and return the monitored metric."""
    table = [row for (model, name), result in results.items() for row in as_rows(model, name, result)]
    metrics: dict[str, Any] = {}
    for row in table:
        key = f"{row['probe']}/{row['metric']}"
        for prefix in [f"{row['model']}/", *([""] if len(models) == 1 else [])]:
            metrics[prefix + key] = row["value"]
            if row["low"] is not None:
                metrics |= {f"{prefix}{key}_low": row["low"], f"{prefix}{key}_high": row["high"]}
    shown = {key: value for key, value in metrics.items() if value is not None and not key.endswith(("_low", "_high"))}
    loggers = run.loggers()
    for logger in loggers:
        logger.log_metrics({f"probe/{key}": value for key, value in shown.items()}, 0)
    metrics["alarms"] = sum(row["alarm"] is not None for row in table)
    monitor = run.settings["monitor"]
    metrics["monitor"] = monitor if monitor in shown else next(iter(shown), None)
    samples: dict[str, list[Row]] = {}
    tables: dict[str, list[Row]] = {"probes": table}
    for (model, name), result in results.items():
        samples.setdefault(name, []).extend({"model": model} | row for row in result.samples)
        for key, rows in result.tables.items():
            tables.setdefault(key, []).extend({"model": model} | row for row in rows)
    for name, rows in samples.items():
        write_jsonl(run.folder / "samples" / f"{name}.jsonl", rows)
    for name, rows in tables.items():
        write_jsonl(run.folder / "tables" / f"{name}.jsonl", rows)
    write_json(run.folder / "metrics.json", metrics)
    log_figures(loggers, run.folder)
    for logger in loggers:
        logger.finalize("success")
    shutil.rmtree(run.folder / "parts")
    show(table)
    Console().print(f"run         {run.folder}", soft_wrap=True)
    return metrics.get(str(metrics["monitor"]))


def as_json(result: Result) -> dict[str, Any]:
    """Return a result as JSON has it, NaN as null."""
    metrics = {name: [None if math.isnan(x) else x for x in value] for name, value in result.metrics.items()}
    return vars(result) | {"metrics": metrics}


def kept(part: Path) -> Result | None:
    """Return what an interrupted run measured, None where it did not."""
    found = read_json(part)
    if found is None:
        return None
    ends = {name: [math.nan if x is None else x for x in value] for name, value in found["metrics"].items()}
    metrics: dict[str, Interval] = {name: (value, low, high) for name, (value, low, high) in ends.items()}
    return Result(metrics, found["samples"], found["tables"], found["alarms"], found["counts"])


@contextlib.contextmanager
def bar(total: int) -> Iterator[Any]:
    """Show a bar of the probes and one of the answers of the present probe, and yield the functions that move them."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        whole = progress.add_task("probes", total=total)
        answers = progress.add_task("", total=None)

        def inside(model: str) -> Any:
            def moved(key: str, done: int, count: int) -> None:
                progress.update(answers, description=f"{model}: {key}", completed=done, total=count)

            return moved

        yield lambda: progress.advance(whole), inside
