"""The report of a pipeline: what is stored of it, as one page that needs nothing else and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from rlhf_lightning.evaluation.report.figures import Drawn, of_metrics, of_samples, of_training
from rlhf_lightning.evaluation.report.findings import findings
from rlhf_lightning.evaluation.report.samples import SideBySide, side_by_side
from rlhf_lightning.evaluation.report.store import Results, Stage, number, read_results, split_difference, visible
from rlhf_lightning.evaluation.report.tables import of_tables
from rlhf_lightning.evaluation.table import COLUMNS, HELD_OUT, HELD_OUT_PAIRS, PAIR_COLUMNS
from rlhf_lightning.files import atomic_path, write_json
from rlhf_lightning.ops.statistics import Interval

VERSION = 1
"""Of report.json; it rises when a key changes its meaning."""
MOST_CELLS = 40
"""Rows of a table on the page; the stored table has all."""
TABLES = {  # tables of which a figure shows too little: name -> title and columns
    "win_rates": ("Win rates", ("model", "opponent", "by", "wins", "ties", "losses", "win_rate", "length_controlled")),
    "fits": ("Fits of overoptimization", ("method", "proxy", "form", "a", "b", "r2")),
    "probes": ("Probes", ("probe", "model", "metric", "value", "count", "alarm")),
}
HAVE_ENDS = ("value", "win_rate")
"""Columns whose interval is in the columns low and high; that of another is in <column>_low and <column>_high."""


@dataclass(frozen=True)
class Cell:
    """What a cell of a table shows: a value, and its interval below it."""

    text: str
    interval: str = ""
    mark: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the page, where it was read from and the command that wrote that."""

    title: str
    header: list[str]
    rows: list[list[Cell]]
    note: str = ""
    source: str = ""
    command: str = ""


def write_report(folders: str | Path | Sequence[str | Path], into: str | Path | None = None) -> Path:
    """Write `report.html` and `report.json` of stored results, and return the path of the page.

    Nothing is computed again. What is missing or cannot be read is named on the page.

    Args:
        folders: the folder of a pipeline or of a run, or several whose stages are shown together.
        into: where the two files go; None is the first of the folders.

    Raises:
        UserError: a folder that holds neither, or a file that cannot be written.
    """
    given = [folders] if isinstance(folders, str | Path) else list(folders)
    results = read_results(*given)
    content = report(results)
    return write_page("report", content, Path(into or given[0]))


def write_page(name: str, content: Mapping[str, Any], into: Path) -> Path:
    """Write `<name>.html` and `<name>.json`, which is the same without the drawings, and return the page's path."""
    page = into / f"{name}.html"
    html = environment().get_template(f"{name}.html").render(content)
    with atomic_path(page) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="replace")
        temporary.chmod(0o644)
    write_json(into / f"{name}.json", plain(content))
    return page


@cache
def environment() -> jinja2.Environment:
    """Return the templates; every value is escaped, but for the drawings."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def plain(value: Any) -> Any:
    """Return content as containers for JSON: no drawings, null for what is no number."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value) if field.name != "figure"}
    if isinstance(value, Mapping):
        return {key: plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [plain(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(results: Results) -> dict[str, Any]:
    """Return the content of the page."""
    looks = looks_of(results)
    samples = samples_of(results, looks)
    found, looked = findings(results)
    figures = list(drawings(results, looks, samples))
    if not any(stage.models for stage in results.stages):
        results.missing.append("no results of models: no stage=evaluate has finished")
    content = {
        "version": VERSION,
        "name": results.name,
        "folders": [str(folder) for folder in results.folders],
        "command": results.command,
        "created": visible(max((str(stage.manifest.get("created", ""))[:19] for stage in results.stages), default="")),
        "findings": found,
        "comparisons": looked,
        "lineage": lineage(results.stages),
        "results": {stage.name: stage.models for stage in results.stages if stage.models},
        "tables": [table for stage in results.stages for table in of_models(stage)],
        "figures": figures,
        "stored": list(stored_tables(results)),
        "samples": [
            {"title": title, "pairs": pairs}
            for stage in sorted(results.stages, key=lambda stage: not stage.models)
            for title, pairs in compared(stage, samples[stage.name])
        ],
        "training": list(of_training(results)),
    }
    return content | {"missing": list(dict.fromkeys(visible(line, 400) for line in results.missing))}


def drawings(results: Results, looks: dict[str, int], samples: Mapping[str, dict[str, Any]]) -> Iterator[Drawn]:
    """Yield the figures of metrics, samples and tables; of those of a training see :func:`of_training`."""
    for stage in results.stages:
        yield from of_metrics(stage, looks)
        if stage.models:
            yield from of_samples(stage, samples[stage.name], looks)
    yield from of_tables(results, looks)


def looks_of(results: Results) -> dict[str, int]:
    """Return the number of the colour of every model, in the order of the stages and then of the results."""
    models = [model for stage in results.stages for model in stage.models if not split_difference(model, stage.models)]
    order = [stage.name for stage in results.stages if stage.name in models]
    return {name: place for place, name in enumerate(dict.fromkeys([*order, *models]))}


def samples_of(results: Results, looks: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return the samples of each stage with the models in the order of their colours."""

    def place(name: str) -> tuple[int, str]:
        return looks.get(visible(name), len(looks)), name

    read = {stage.name: results.samples(stage) for stage in results.stages}
    return {stage: {name: of[name] for name in sorted(of, key=place)} for stage, of in read.items()}


# ---- tables ----------------------------------------------------------------------------------------------------------


def lineage(stages: Sequence[Stage]) -> Table:
    """Return the table of stages: what each started from and what it wrote."""
    header = ["stage", "kind", "from", "weights (SHA-256)", "seed", "updates", "monitored", "written"]
    rows = []
    for stage in stages:
        monitor = str(stage.metrics.get("monitor") or "")
        value = number(stage.metrics.get(monitor))
        written = str(stage.manifest.get("created", ""))[:16].replace("T", " ")
        texts = [
            stage.name,
            stage.kind,
            ", ".join(stage.parents) or "-",
            stage.weights[:12] or "-",
            stage.manifest.get("seed", "-"),
            stage.metrics.get("global_step", "-"),
            f"{monitor} {value:.4g}" if value is not None else "-" if stage.done else "not finished",
            written or "-",
        ]
        rows.append([Cell(visible(text)) for text in texts])
    return Table("Stages", header, rows)


def of_models(stage: Stage) -> Iterator[Table]:
    """Yield the tables of a stage that has evaluated models: policies, reward models, paired differences."""
    plain_rows = {name: row for name, row in stage.models.items() if not split_difference(name, stage.models)}
    gaps = {name: row for name, row in stage.models.items() if name not in plain_rows}
    source = f"{stage.name}/metrics.json"
    reward_models = {name: row for name, row in plain_rows.items() if "accuracy" in row}
    policies = {name: row for name, row in plain_rows.items() if name not in reward_models}
    for title, rows, known in (
        (HELD_OUT, policies, COLUMNS),
        ("paired differences", gaps, COLUMNS),
        (HELD_OUT_PAIRS, reward_models, PAIR_COLUMNS),
    ):
        columns = {m: t.removesuffix(" (95%)") for m, t in known.items() if any(m in row for row in rows.values())}
        shown = [name for name, row in rows.items() if row.keys() & columns.keys()]
        if shown and columns:
            cells = [[Cell(name), *(of_interval(rows[name].get(metric)) for metric in columns)] for name in shown]
            yield Table(
                f"{stage.name}: {title}",
                ["model", *columns.values()],
                cells,
                "with 95% intervals",
                source,
                stage.command,
            )


def of_interval(value: Interval | None) -> Cell:
    """Return the cell of a value."""
    if value is None:
        return Cell("")
    mean, low, high = value
    form = ".1f" if abs(mean) >= 10 else ".3f"
    return Cell(
        f"{mean:{form}}", f"{low:{form}} to {high:{form}}" if math.isfinite(low) and math.isfinite(high) else ""
    )


def stored_tables(results: Results) -> Iterator[Table]:
    """Yield the stored tables of which a figure shows too little."""
    for name, (title, columns) in TABLES.items():
        for stage, rows in results.rows(name):
            known = [column for column in columns if any(column in row for row in rows)]
            alarms_first = sorted(rows, key=lambda row: not row.get("alarm"))
            cells = [[stored(row, column) for column in known] for row in alarms_first[:MOST_CELLS]]
            note = f"{MOST_CELLS} of {len(rows)} rows" if len(rows) > MOST_CELLS else ""
            header = [column.replace("_", " ") for column in known]
            yield Table(title, header, cells, note, f"{stage.name}/tables/{name}.jsonl", stage.command)


def stored(row: Mapping[str, Any], column: str) -> Cell:
    """Return the cell of a stored value, with the ends of its interval where the row has them."""
    value = row.get(column)
    if (known := number(value)) is None:
        return Cell("" if value is None or value is False else visible(value), mark=column == "alarm" and bool(value))
    own = (f"{column}_low", f"{column}_high")
    low, high = (number(row.get(end)) for end in (("low", "high") if column in HAVE_ENDS else own))
    if low is not None and high is not None:
        return of_interval((known, low, high))
    return Cell(f"{value:,}") if isinstance(value, int) else of_interval((known, math.nan, math.nan))


# ---- samples ---------------------------------------------------------------------------------------------------------


def compared(stage: Stage, samples: Mapping[str, list[dict[str, Any]]]) -> Iterator[tuple[str, list[SideBySide]]]:
    """Yield what is shown side by side of a stage: its models, those of each probe, its first and last step."""
    steps = sorted(name for name in samples if name.startswith("step_"))
    of_probes = {name: rows for name, rows in samples.items() if all("model" in row for row in rows)}
    models = {name: rows for name, rows in samples.items() if name not in steps and name not in of_probes}
    if pairs := side_by_side(models, apart=stage.earlier):
        yield f"{stage.name}: where the models differ most", pairs
    for name, rows in of_probes.items():
        by_model: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            by_model.setdefault(visible(row["model"]), []).append(row)
        if pairs := side_by_side(by_model, most=4, least=min(2, len(by_model))):
            yield f"{stage.name}: {visible(name)}", pairs
    if len(steps) > 1:
        ends = {f"step {name[5:].lstrip('0') or 0}": samples[name] for name in (steps[0], steps[-1])}
        if pairs := side_by_side(ends, most=3):
            yield f"{stage.name}: before and after", pairs
