"""The stored results of a pipeline or a run, read for a page: nothing is trusted, and what cannot be read is named."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf_lightning.errors import UserError
from rlhf_lightning.files import read_json, regular
from rlhf_lightning.models.folder import MANIFEST
from rlhf_lightning.ops.statistics import Interval

STAGE = re.compile(r"(\d+)_(.+)")
MOST_ROWS, MOST_BYTES = 20_000, 64 << 20
"""Of a file of samples or of a table; a page shows fewer."""
LARGEST = 1e15
"""A number beyond it is no result; the axes of a figure could not be computed."""
CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def visible(value: Any, limit: int = 200) -> str:
    """Return `value` as a text to show: without characters that are invisible or change the direction, at most `limit`.

    Such a character is shown by its code point, as in ⟨U+202E⟩.
    """
    text = str(value)
    cut = text[:limit]
    shown = CONTROL.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", cut)
    return shown if len(text) == len(cut) else f"{shown}… ({len(text) - len(cut):,} more characters)"


def number(value: Any) -> float | None:
    """Return a finite number of a sensible size, None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        return None
    return float(value)


def column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Return a column of numbers, NaN where a row has none."""
    return [math.nan if (value := number(row.get(name))) is None else value for row in rows]


@dataclass
class Stage:
    """One run folder. `models` is model -> metric -> (value, low, high) of a stage that evaluates, else empty.

    `earlier` are those of its models that a model it compares with was trained from: that they are worse is no news.
    """

    name: str
    folder: Path
    kind: str = ""
    done: bool = False
    command: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    models: dict[str, dict[str, Interval]] = field(default_factory=dict)
    parents: list[str] = field(default_factory=list)
    earlier: set[str] = field(default_factory=set)

    @property
    def weights(self) -> str:
        """The hash of the weights that it wrote, empty where it wrote none."""
        return str(self.manifest.get("weights") or "")


@dataclass
class Results:
    """What is stored of a pipeline: its stages in order, and in plain words what is missing or cannot be read."""

    name: str
    folders: list[Path]
    command: str
    stages: list[Stage]
    missing: list[str] = field(default_factory=list)

    def before(self, model: str) -> set[str]:
        """Return the stages that a model was trained from, one after the other; a reward model is none of them."""
        trained = {stage.name: stage for stage in self.stages if stage.manifest}
        found, names = set[str](), [model]
        while names:
            stage = trained.get(names.pop())
            new = [parent for parent in (stage.parents if stage else ()) if parent in trained and parent not in found]
            found.update(new)
            names += new
        return found

    def rows(self, table: str) -> Iterator[tuple[Stage, list[dict[str, Any]]]]:
        """Yield every stage that has stored this table, with its rows."""
        for stage in self.stages:
            if rows := read_rows(stage.folder / "tables" / f"{table}.jsonl", self.missing.append):
                yield stage, rows

    def samples(self, stage: Stage) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of every file of samples of a stage, by the file's name without its ending."""
        files = sorted((stage.folder / "samples").glob("*.jsonl"))
        read = {file.stem: read_rows(file, self.missing.append) for file in files}
        return {name: rows for name, rows in read.items() if rows}


def read_results(*folders: str | Path) -> Results:
    """Return the stored results of pipeline folders and run folders, their stages one after the other.

    Raises:
        UserError: a folder does not exist, or holds neither a pipeline nor a run.
    """
    results = Results("", [], "", [])
    names = []
    for given in folders:
        folder = Path(given)
        if not folder.is_dir():
            raise UserError(f"{given} is not a folder; give a pipeline's folder or a run's, such as outputs/...")
        parts = sorted(
            (int(m[1]), m[2], path) for path in folder.iterdir() if (m := stage_name(path)) and path.is_dir()
        )
        if not parts and not (folder / "run.json").is_file():
            raise UserError(f"{folder} holds neither the stages of a pipeline (0_<name>, ...) nor a run (run.json)")
        results.folders.append(folder)
        config = guarded(lambda folder=folder: read_yaml(folder / ".hydra" / "config.yaml"), results.missing.append)
        pipeline = subdict(config, "pipeline")
        names.append(visible((pipeline.get("name") if parts else None) or folder.resolve().name))
        results.command = results.command or command_of(folder, results.missing.append)
        stages = [read_stage(name, path, results.missing.append) for _, name, path in parts]
        if not parts:
            stages = [read_stage(str(config.get("stage") or folder.resolve().name), folder, results.missing.append)]
        for stage in stages:  # of several folders: two may have an evaluation
            same = sum(other.name.partition(" (")[0] == stage.name for other in results.stages)
            stage.name += f" ({same + 1})" if same else ""
            results.stages.append(stage)
        started = {name for _, name, _ in parts}
        results.missing += [
            f"stage {visible(name)} has not been started" for name in subdict(pipeline, "stages") if name not in started
        ]
    results.missing += [
        f"stage {stage.name} has not finished: there is no metrics.json" for stage in results.stages if not stage.done
    ]
    results.name = " + ".join(names)
    link(results)
    for stage in results.stages:
        references = {pair[1] for name in stage.models if (pair := split_difference(name, stage.models))}
        stage.earlier = {model for reference in references for model in results.before(reference)}
    return results


def subdict(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the dict at a key, an empty one where something else is there."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def stage_name(path: Path) -> re.Match[str] | None:
    """Return the number and name in the name of a stage's folder; what an earlier start left is none."""
    return None if ".old-" in path.name else STAGE.fullmatch(path.name)


def read_stage(name: str, folder: Path, complain: Callable[[str], None]) -> Stage:
    """Return what is stored in one run folder."""

    def read(file: Path) -> dict[str, Any]:
        return guarded(lambda: read_json(file) or {}, complain)

    record, metrics = read(folder / "run.json"), read(folder / "metrics.json")
    config = guarded(lambda: read_yaml(folder / ".hydra" / "config.yaml"), complain)
    stage = Stage(
        visible(name),
        folder,
        kind=visible(record.get("stage") or config.get("stage") or ""),
        done=(folder / "metrics.json").is_file(),
        command=command_of(folder, complain),
        config=config,
        manifest=read(folder / "model" / MANIFEST),
        metrics=metrics,
    )
    probes = (folder / "tables" / "probes.jsonl").is_file()  # its metrics are <model>/<probe>/<metric>
    if not stage.manifest and not probes:  # a stage that trains has tags such as val/accuracy, where val is no model
        stage.models = models_of(metrics)
    return stage


def models_of(metrics: Mapping[str, Any]) -> dict[str, dict[str, Interval]]:
    """Return model -> metric -> (value, low, high) of the flat keys `<model>/<metric>`, with NaN for absent ends."""
    found: dict[str, dict[str, Interval]] = {}
    for key, value in metrics.items():
        model, slash, metric = key.partition("/")
        if not slash or model == "perf" or "/" in metric or (value := number(value)) is None:
            continue
        if metric.endswith(("_low", "_high")) and key.rpartition("_")[0] in metrics:
            continue
        low, high = (number(metrics.get(f"{key}_{end}")) for end in ("low", "high"))
        interval = (value, math.nan, math.nan) if low is None or high is None else (value, low, high)
        found.setdefault(visible(model), {})[visible(metric)] = interval
    return found


def split_difference(name: str, table: Collection[str]) -> tuple[str, str] | None:
    """Return the two models of a row `<model>-<reference>` of paired differences, None where it is another row."""
    for place, letter in enumerate(name):
        if letter == "-" and name[:place] in table and name[place + 1 :] in table:
            return name[:place], name[place + 1 :]
    return None


def link(results: Results) -> None:
    """Fill in which stages each stage starts from: by the hash of the weights, else by what its settings name."""
    by_weights = {stage.weights: stage.name for stage in results.stages if stage.weights}
    for stage in results.stages:
        parents = stage.manifest.get("parents")
        parents = [p for p in parents if isinstance(p, dict)] if isinstance(parents, list) else []
        if not stage.manifest:
            text = json.dumps(stage.config, default=str)
            stage.parents = [o.name for o in results.stages if o is not stage and place_of(o, stage) in text]
        for parent in parents:
            role, place = visible(parent.get("role", "")), Path(str(parent.get("folder", "")))
            beside = [o for o in results.stages if o.folder.parent == stage.folder.parent]
            named = next((o for o in beside if o.folder.name in place.parts), None)
            known = by_weights.get(str(parent.get("weights")))
            if known is None and named is not None and named is not stage and named.weights:
                results.missing.append(
                    f"stage {stage.name} was trained from other weights of {named.name} than are there now"
                )
            name = known or (named.name if named is not None and named is not stage else visible(place.name or place))
            if named is not stage:
                stage.parents.append(name if role == "init" else f"{name} ({role})")


def place_of(stage: Stage, seen_from: Stage) -> str:
    """Return the part of a path that names a stage's folder, beside another stage's in the same pipeline or not."""
    beside = stage.folder.parent == seen_from.folder.parent
    return f"{stage.folder.name}/" if beside else f"{stage.folder.resolve().parent.name}/{stage.folder.name}/"


def command_of(folder: Path, complain: Callable[[str], None]) -> str:
    """Return the command that a run folder was made by, empty where it is not stored."""
    overrides = guarded(lambda: {"": read_yaml(folder / ".hydra" / "overrides.yaml", list)}, complain).get("")
    if not overrides:
        return ""
    words = [str(word) for word in overrides if not str(word).startswith("resume=")]
    return visible("rlhf " + " ".join(map(shlex.quote, words)), 4000)


# ---- files -----------------------------------------------------------------------------------------------------------


class _WithoutAliases(yaml.SafeLoader):
    """Hydra writes none, and a few lines of aliases of aliases would be endless as JSON."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def guarded(read: Callable[[], dict[str, Any]], complain: Callable[[str], None]) -> dict[str, Any]:
    """Return what `read` returns, or an empty dict after a complaint."""
    try:
        return read()
    except UserError as error:
        complain(visible(error, 400))
        return {}


def read_yaml(path: Path, kind: type = dict) -> Any:
    """Return a YAML file of plain values, which must be a `kind`; an empty one where there is no file."""
    if not path.is_file():
        return kind()
    try:
        content = yaml.load(regular(path).read_text(encoding="utf-8"), _WithoutAliases)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not readable YAML ({type(error).__name__})") from error
    if not isinstance(content, kind):
        raise UserError(f"{path} is not readable: a {type(content).__name__}, not a {kind.__name__}")
    return content


def read_rows(path: Path, complain: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file, the first `MOST_ROWS` and `MOST_BYTES` of them; complain of other lines."""
    if not path.is_file():
        return []
    rows, bad = [], []
    try:
        with regular(path).open("rb") as opened:
            for place, line in enumerate(iter(lambda: opened.readline(MOST_BYTES), b""), 1):
                if place > MOST_ROWS or opened.tell() > MOST_BYTES:
                    complain(f"{path}: only the first {place - 1:,} rows are read")
                    break
                try:
                    row = json.loads(line.decode("utf-8", "replace"))
                except (ValueError, RecursionError):
                    row = None
                rows.append(row) if isinstance(row, dict) else bad.append(place)
    except (OSError, UserError) as error:
        complain(visible(f"{path} cannot be read: {error}", 400))
    if bad:
        complain(f"{path}, row {bad[0]}: not a JSON object{f', nor are {len(bad) - 1} others' if bad[1:] else ''}")
    return rows


Curves = dict[str, list[tuple[int, float]]]
"""Tag -> (step, value)."""


def curves(folder: Path, tags: Collection[str], complain: Callable[[str], None]) -> Curves:
    """Return what a run logged of `tags` to TensorBoard, or else to CSV."""
    found: Curves = {}
    for place, read in ((folder / "tensorboard", from_tensorboard), (folder / "csv", from_csv)):
        if place.is_dir() and not found:
            try:
                found = read(place, tags)
            except Exception as error:  # a file of another program, cut off, or made to break its reader
                complain(f"{place} cannot be read ({type(error).__name__})")
    known = {tag: [(step, value) for step, value in found[tag] if number(value) is not None] for tag in found}
    return {tag: known[tag] for tag in tags if known.get(tag)}


def from_tensorboard(place: Path, tags: Collection[str]) -> Curves:
    """Return the scalars of event files, at most 500 of each."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(place), size_guidance={SCALARS: 500})
    events.Reload()
    kept = [tag for tag in events.Tags()[SCALARS] if tag in tags]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in kept}


def from_csv(place: Path, tags: Collection[str]) -> Curves:
    """Return the columns of Lightning's metrics.csv, of the first version there is."""
    found: Curves = {}
    for file in sorted(place.glob("**/metrics.csv"))[:1]:
        with regular(file).open(encoding="utf-8", newline="") as opened:
            for row in csv.DictReader(opened):
                for tag in tags:
                    if row.get(tag):
                        found.setdefault(tag, []).append((int(row["step"]), float(row[tag])))
    return found
