"""Pipelines side by side on one page: what differs in their configuration and in their results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.plots import Series, forest, lines
from rlhf_lightning.evaluation.report.figures import REWARDS, Drawn
from rlhf_lightning.evaluation.report.findings import findings
from rlhf_lightning.evaluation.report.page import VERSION, Cell, Table, lineage, of_interval, write_page
from rlhf_lightning.evaluation.report.samples import side_by_side
from rlhf_lightning.evaluation.report.store import Results, Stage, read_results, split_difference, visible
from rlhf_lightning.ops.statistics import Interval

PLACES = ("run_folder", "run_id", "resume", "paths", "hydra", "name", "logger", "pipeline")
"""Keys that say where a run is and writes, not what it does."""


def named(folders: Sequence[str | Path]) -> dict[str, str | Path]:
    """Return a name -> each folder: the end of its path, with as many parts as tell the folders apart.

    Raises:
        UserError: a folder is there twice.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise UserError(f"{twice} is to be compared with itself")
    names: list[str] = []
    for count in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, folders, strict=True))


def write_comparison(folders: Mapping[str, str | Path], into: str | Path) -> Path:
    """Write `compare.html` and `compare.json` of pipelines or runs, and return the path of the page.

    Args:
        folders: the name that the page calls it by -> its folder; at least two.

    Raises:
        UserError: fewer than two, or a folder that holds neither a pipeline nor a run.
    """
    if len(folders) < 2:
        raise UserError("a comparison needs at least two folders, each with a name")
    of = {visible(name): read_results(folder) for name, folder in folders.items()}
    return write_page("compare", comparison(of), Path(into))


def comparison(of: Mapping[str, Results]) -> dict[str, Any]:
    """Return the content of the page."""
    tables = list(results_tables(of))
    content = {
        "version": VERSION,
        "name": " and ".join(of),
        "folders": {name: str(results.folders[0]) for name, results in of.items()},
        "commands": {name: results.command for name, results in of.items()},
        "settings": list(settings_tables(of)),
        "tables": tables,
        "figures": list(figures(of)),
        "samples": list(answers(of)),
        "findings": {name: findings(results)[0] for name, results in of.items()},
        "lineage": {name: lineage(results.stages) for name, results in of.items()},
    }
    missing = [f"{name}: {line}" for name, results in of.items() for line in results.missing]
    if not tables:
        missing.append("no model has results in two of them")
    return content | {"missing": list(dict.fromkeys(visible(line, 400) for line in missing))}


def shared(of: Mapping[str, Results]) -> list[str]:
    """Return the names of the stages that any has, in their order."""
    return list(dict.fromkeys(stage.name for results in of.values() for stage in results.stages))


def stage_of(results: Results, name: str) -> Stage | None:
    """Return the stage of this name."""
    return next((stage for stage in results.stages if stage.name == name), None)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return key.key -> value of nested dicts."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, member in value.items():
        found |= flat(member, f"{prefix}.{key}" if prefix else str(key))
    return found


def settings_tables(of: Mapping[str, Results]) -> Iterator[Table]:
    """Yield the stages that not all have, and for every other stage the settings that differ.

    The folders of the pipelines themselves do not count.
    """
    everywhere = {name: {label: stage_of(results, name) for label, results in of.items()} for name in shared(of)}
    some = {name: stages for name, stages in everywhere.items() if None in stages.values()}
    if some:
        rows = [
            [Cell(name), *(Cell("yes" if stage else "no") for stage in stages.values())]
            for name, stages in some.items()
        ]
        yield Table("Stages that not all have", ["stage", *of], rows)
    for name, stages in everywhere.items():
        settings = {label: settings_of(stage, of[label]) for label, stage in stages.items() if stage is not None}
        keys = dict.fromkeys(key for config in settings.values() for key in config)
        values = {key: [config.get(key, "-") for config in settings.values()] for key in keys}
        rows = [
            [Cell(visible(key)), *(Cell(visible(v)) for v in row)] for key, row in values.items() if len(set(row)) > 1
        ]
        if rows and name not in some:
            yield Table(f"Settings of {name}", ["key", *of], rows)


def settings_of(stage: Stage, results: Results) -> dict[str, Any]:
    """Return the flat settings of a stage, with the pipeline's own folder written as `.`."""
    own = str(results.folders[0].resolve())
    settings = flat({key: value for key, value in stage.config.items() if key not in PLACES})
    return {key: "null" if value is None else str(value).replace(own, ".") for key, value in settings.items()}


def results_tables(of: Mapping[str, Results]) -> Iterator[Table]:
    """Yield for every stage the metrics of each model that at least two have, with their intervals."""
    for name in shared(of):
        tables = {
            label: stage.models for label, results in of.items() if (stage := stage_of(results, name)) and stage.models
        }
        models = dict.fromkeys(model for table in tables.values() for model in table)
        rows = []
        for model in models:
            having = {label: table[model] for label, table in tables.items() if model in table}
            for metric in dict.fromkeys(metric for row in having.values() for metric in row) if len(having) > 1 else ():
                values = {label: row[metric] for label, row in having.items() if metric in row}
                if len(set(values.values())) > 1 or len(values) < len(having):
                    apart = "yes" if are_apart(list(values.values())) else ""
                    cells = [of_interval(values.get(label)) for label in of]
                    rows.append([Cell(f"{model}: {metric}"), *cells, Cell(apart, mark=bool(apart))])
        if rows:
            note = (
                "metrics that are not equal; two 95% intervals that do not overlap are a difference, others may be one"
            )
            yield Table(f"Results of {name}", ["model: metric", *of, "intervals apart"], rows, note)


def are_apart(values: list[Interval]) -> bool:
    """Return whether two of the intervals do not overlap."""
    known = [value for value in values if math.isfinite(value[1])]
    return any(one[2] < other[1] for one in known for other in known)


def figures(of: Mapping[str, Results]) -> Iterator[Drawn]:
    """Yield for each reward its value for every model in each pipeline, and against KL."""
    looks = {label: place for place, label in enumerate(of)}
    for metric, title in REWARDS.items():
        found = list(measured(of, metric))
        order = list(dict.fromkeys(model for _, model, _ in found))
        found.sort(key=lambda one: order.index(one[1]))  # the pipelines of a model together
        if len({label for label, *_ in found}) < 2:
            continue
        bars = [(f"{model}, {label}", row[metric]) for label, model, row in found]
        figure = forest(bars, title, looks=[looks[label] for label, *_ in found])
        yield Drawn(title.capitalize(), figure, "Bars are 95% intervals.", "metrics.json of each", "")
        series = []
        for label in of:
            points = [(row["kl"], row[metric]) for name, _, row in found if name == label and "kl" in row]
            x, y = [kl for kl, _ in points], [value for _, value in points]
            ends = ([value[end] for value in of] for of in (y, x) for end in (1, 2))
            series.append(Series(label, [v[0] for v in x], [v[0] for v in y], *ends, look=looks[label], line=False))
        if all(one.x for one in series):
            figure = lines(series, "KL to the reference (nats)", title)
            yield Drawn(f"{title.capitalize()} against KL", figure, "", "metrics.json of each", "")


def measured(of: Mapping[str, Results], metric: str) -> Iterator[tuple[str, str, Mapping[str, Interval]]]:
    """Yield the pipeline, model and values of every model that has this metric."""
    for label, results in of.items():
        for stage in results.stages:
            for model, row in stage.models.items():
                if metric in row and model not in stage.earlier and not split_difference(model, stage.models):
                    yield label, model, row


def answers(of: Mapping[str, Results]) -> Iterator[dict[str, Any]]:
    """Yield for every model that several have what they answered to the same prompts."""
    for name in shared(of):
        stages = {label: stage for label, results in of.items() if (stage := stage_of(results, name)) and stage.models}
        samples = {label: of[label].samples(stage) for label, stage in stages.items()} if len(stages) > 1 else {}
        for model in dict.fromkeys(model for rows in samples.values() for model in rows):
            having = {label: rows[model] for label, rows in samples.items() if model in rows}
            if pairs := side_by_side(having, most=6):
                yield {"title": f"Answers of {visible(model)}", "pairs": pairs}
