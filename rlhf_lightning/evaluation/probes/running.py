"""Running probes on a model, from a stage, a callback or a notebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.evaluation.probes import PROBES
from rlhf_lightning.evaluation.probes.probe import NEEDS, Probe, Result, Row, Subject
from rlhf_lightning.evaluation.probes.rows import read_rows
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.models.loading import context_length, load_causal_lm, load_tokenizer
from rlhf_lightning.ops.statistics import as_columns
from rlhf_lightning.rewards.scoring import to_device

GIVE = {
    "gold": "gold_from=<world or module:function>",
    "reward": "reward_from=<reward model folder, module:function or world>",
    "judge": "judge=<judge>",
    "reference": "probe.reference=<folder>",
}
"""What a probe may need -> how to give it."""


def find_probe(name: str) -> Probe:
    """Return the probe of that name, or raise a UserError."""
    if name not in PROBES:
        raise UserError(f"probe={name} is no probe: one of {', '.join(PROBES)}, or all.{nearest(name, PROBES)}")
    return PROBES[name]


def load_subject(
    folder: str,
    engine: Engine | None = None,
    *,
    template: str = "auto",
    load: Mapping[str, Any] | None = None,
    device: str = "cpu",
    reference: str | Callable[[], Subject] | None = None,
    **options: Any,
) -> Subject:
    """Return a model folder as the subject of probes.

    Args:
        engine: generates; None is a :class:`LocalEngine`.
        template: as `data.template`.
        load: arguments of :func:`load_causal_lm`.
        reference: a folder to compare with, or what returns its subject; loaded at its first use.
        options: of :class:`Subject`.
    """
    lm: Any = load_causal_lm(folder, **(load or {}))
    engine = engine or LocalEngine()
    if isinstance(reference, str):
        common: dict[str, Any] = {"template": template, "load": load, "device": device}
        reference = partial(load_subject, reference, engine, **common, **options, remember=True)
    return Subject(
        lm.eval().to(device),
        Template(load_tokenizer(folder), template),
        engine,
        reference=reference,
        context=context_length(folder),
        device=device,
        **options,
    )


def run_probe(
    name: str, subject: Subject, data: Any = None, rows: int | None = None, settings: Mapping[str, Any] | None = None
) -> Result:
    """Return what a probe measures of a subject.

    Args:
        name: of the table of probes.
        data: None is the set in this package, "world" the built-in world, else a file or a Source.
        rows: prompts, at most.
        settings: options of the probe, in place of their defaults.

    Raises:
        UserError: no such probe or option, a row that it cannot read, or a subject without what it needs.
    """
    probe = find_probe(name)
    check_settings(probe, settings or {}, subject.temperature)
    check_needs(probe, {need for need in NEEDS if has(subject, need)})
    read = read_rows(probe, data, rows, subject.seed)
    for reward in (subject.gold, subject.reward):
        to_device(reward, subject.device)
    return probe.load()(subject, read, **dict(probe.settings) | dict(settings or {}))


def has(subject: Subject, need: str) -> bool:
    """Return whether a subject has one of `NEEDS`."""
    return subject.has_reference if need == "reference" else getattr(subject, need) is not None


def check_settings(probe: Probe, settings: Mapping[str, Any], temperature: float) -> None:
    """Raise a UserError for an option that the probe does not have, or that is out of range."""
    for option in settings:
        if option not in probe.settings:
            known = ", ".join(probe.settings) or "none"
            hint = nearest(option, probe.settings)
            raise UserError(f"probe.{probe.name}.{option}: there is no such option; its options: {known}.{hint}")
    probe.check_options(temperature, settings)


def check_needs(probe: Probe, given: set[str]) -> None:
    """Raise a UserError for a probe without what it needs."""
    if missing := [need for need in probe.needs if need not in given]:
        raise UserError(f"probe={probe.name} needs {', '.join(GIVE[need] for need in missing)}")


def check_used(probes: Sequence[Probe], given: set[str]) -> None:
    """Raise a UserError for what was given and no probe uses."""
    used = {need for probe in probes for need in (*probe.needs, *probe.uses)}
    if unused := [need for need in NEEDS if need in given - used]:
        names = ", ".join(probe.name for probe in probes)
        raise UserError(f"{GIVE[unused[0]].partition('=')[0]} was given, and probe={names} does not use it")


def as_rows(model: str, probe: str, result: Result) -> list[Row]:
    """Return a result as the rows of tables/probes.jsonl."""
    return [
        {
            "probe": probe,
            "model": model,
            "metric": metric,
            **as_columns("value", value),
            "count": result.counts.get(metric),
            "alarm": result.alarms.get(metric),
        }
        for metric, value in result.metrics.items()
    ]


def show(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the rows of tables/probes.jsonl: a line per metric, a column per model, and the alarms."""
    console = console or Console()
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row["probe"], row["metric"]), {})[row["model"]] = cell(row)
    printed = Table("probe", "metric", *models, title="probes (95% intervals; ! is an alarm)")
    last = ""
    for (probe, metric), values in cells.items():
        printed.add_row("" if probe == last else probe, metric, *(values.get(model, "") for model in models))
        last = probe
    if console.width < 240 and not console.is_terminal:
        console = Console(file=console.file, width=240)  # a log is not folded
    console.print(printed)
    for row in rows:
        if row["alarm"]:
            line = f"! {row['model']}: {row['probe']}/{row['metric']}: {row['alarm']}"
            console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if not any(row["alarm"] for row in rows):
        console.print("no alarm", highlight=False)


def cell(row: Row) -> str:
    """Return the value of a row with its interval."""
    if row["value"] is None:
        return ""
    mark = " !" if row["alarm"] else ""
    if row["low"] is None:
        return f"{row['value']:.3f}{mark}"
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]{mark}"
