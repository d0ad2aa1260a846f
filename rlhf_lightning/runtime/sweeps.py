"""A sweep: every trial is a separate process; at the end a table, sweep.csv, a plot and a link to the best trial."""

from __future__ import annotations

import csv
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from rlhf_lightning.distributed import ranks
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.files import atomic_path, read_json, write_json
from rlhf_lightning.runtime.processes import run_child
from rlhf_lightning.runtime.run_folder import occupy
from rlhf_lightning.runtime.settings import lower_is_better, task_overrides

RECORD = "trial.json"
REWARDS = ("val/gold", "val/reward", "reward/gold", "reward/proxy", "gold")
KLS = ("val/kl", "kl/reference", "kl")


@dataclass(frozen=True)
class Trial:
    """One trial as its folder records it; `objectives` are empty when it did not finish."""

    folder: Path
    number: int
    status: str
    seconds: float
    overrides: dict[str, str]
    objectives: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


# ---- one trial -----------------------------------------------------------------------------------------------------


def run_trial(cfg: DictConfig) -> float | list[float] | None:
    """Run the trial that Hydra composed and return its objectives; None when it failed.

    A separate process gives a trial all its ranks, whatever launches them, and contains its failure.
    """
    hydra = HydraConfig.get()
    if "GridSampler" in str(hydra.sweeper.get("sampler", "")):
        raise UserError(
            "Optuna's grid sampler tries values in an order that no seed fixes, so a second start could not skip what "
            "is done; leave hydra/sweeper=optuna out, and `-m key=a,b` tries every value"
        )
    folder, overrides = Path(hydra.runtime.output_dir), task_overrides()
    record: dict[str, Any] = {"number": hydra.job.num, "overrides": overrides, "status": "running", "seconds": 0.0}
    before = read_json(folder / RECORD) or {}
    spent, began = before.get("seconds", 0.0) if before.get("status") == "done" else 0.0, time.monotonic()

    def write(**changes: Any) -> None:
        record.update(changes, seconds=spent or time.monotonic() - began)
        if (ranks() or (0, 1))[0] == 0:
            write_json(folder / RECORD, record)

    write()
    try:
        code = run_child(folder, overrides, shared_machine(cfg, hydra) | {"RLHF_TRIAL": str(hydra.job.num)})
    except KeyboardInterrupt:
        write(status="interrupted")
        raise
    if (ranks() or (0, 1))[0] > 0:
        return None  # the first rank's task judges the trial
    metrics = read_metrics(folder) if code == 0 else None
    names = list(cfg.objectives or [(metrics or {}).get("monitor") or cfg.monitor])
    missing = [name for name in names if metrics is not None and name not in metrics]
    if metrics is None or missing:
        why = f"exit code {code}" if metrics is None else f"no {missing[0]}.{nearest(missing[0], metrics)}"
        write(status=f"failed: {why}")
        values = None  # which Optuna counts as a failure, too
    else:
        values = [float(metrics[name]) for name in names]
        write(status="done", objectives=dict(zip(names, values, strict=True)))
    write_csv(folder.parent)
    if record["status"] != "done" and cfg.on_failed_trial == "stop":
        raise UserError(f"trial {hydra.job.num} {record['status']}; its log is {folder / 'run.log'}")
    return values if cfg.objectives or values is None else values[0]


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """Return the metrics of a stage, or those of the last stage of a pipeline."""
    files = [path for path in folder.glob("[0-9]*_*/metrics.json") if ".old-" not in path.parent.name]
    stages = sorted(files, key=lambda path: int(path.parent.name.partition("_")[0]))
    return read_json(folder / "metrics.json" if not stages else stages[-1])


def shared_machine(cfg: DictConfig, hydra: Any, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return what a trial's environment needs when others run beside it: one of the devices, its share of the cores."""
    beside = hydra.launcher.get("n_jobs", 1)
    if beside in (None, 1) or "joblib" not in str(hydra.launcher.get("_target_", "")).lower():
        return {}
    cores = os.cpu_count() or 1
    environment = {
        "OMP_NUM_THREADS": given.get("OMP_NUM_THREADS", str(max(cores // (beside if beside > 0 else cores), 1)))
    }
    devices = given.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(devices) > 1 and cfg.trainer.devices == 1:
        environment["CUDA_VISIBLE_DEVICES"] = devices[hydra.job.num % len(devices)]
    return environment


# ---- all trials ----------------------------------------------------------------------------------------------------


class SweepSummary(Callback):
    """Hydra calls it before the first trial of a sweep and after the last one."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            occupy(Path(config.hydra.sweep.dir))
        except UserError as error:  # of which Hydra would make a warning
            print(f"rlhf: {error}", file=sys.stderr, flush=True)
            sys.exit(2)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        if trials := read_trials(folder):
            summarize(folder, trials)
        if failed := [str(trial.number) for trial in trials if trial.status != "done"]:
            print(
                f"rlhf: {len(failed)} of {len(trials)} trials failed: {', '.join(failed)}", file=sys.stderr, flush=True
            )
            sys.exit(1)


def read_trials(folder: Path) -> list[Trial]:
    """Return the trials of a sweep's folder in the order of their numbers."""
    trials = []
    for place in folder.glob(f"*/{RECORD}"):
        if place.parent.is_symlink():  # best
            continue
        record = read_json(place) or {}
        if missing := {"number", "status", "seconds", "overrides"} - record.keys():
            raise UserError(f"{place} is damaged: it has no {', '.join(sorted(missing))}")
        metrics = read_metrics(place.parent) if record["status"] == "done" else None
        pairs = (override.lstrip("+").partition("=") for override in record["overrides"])
        trials.append(
            Trial(
                place.parent, record["number"], record["status"], record["seconds"],
                {key: value for key, _, value in pairs}, record.get("objectives", {}),
                {key: value for key, value in (metrics or {}).items() if isinstance(value, int | float)},
            )
        )  # fmt: skip
    return sorted(trials, key=lambda trial: trial.number)


def swept_keys(trials: list[Trial]) -> list[str]:
    """Return the keys whose value is not the same in all trials."""
    keys = dict.fromkeys(key for trial in trials for key in trial.overrides)
    return [key for key in keys if len({trial.overrides.get(key) for trial in trials}) > 1]


def best_trial(trials: list[Trial]) -> Trial | None:
    """Return the trial whose first objective is best."""
    done = [trial for trial in trials if trial.objectives and not math.isnan(next(iter(trial.objectives.values())))]
    if not done:
        return None
    metric = next(iter(done[0].objectives))
    sign = -1 if lower_is_better(metric) else 1
    return max(done, key=lambda trial: sign * trial.objectives.get(metric, -sign * math.inf))


def write_csv(folder: Path, trials: list[Trial] | None = None) -> None:
    """Write `sweep.csv`: a row per trial, with swept values, objectives and every metric."""
    trials = read_trials(folder) if trials is None else trials
    keys = swept_keys(trials)
    objectives = list(dict.fromkeys(name for trial in trials for name in trial.objectives))
    others = sorted({name for trial in trials for name in trial.metrics} - set(objectives))
    with atomic_path(folder / "sweep.csv") as temporary, temporary.open("w", newline="") as opened:
        rows = csv.writer(opened)
        rows.writerow(["trial", "status", "seconds", *keys, *objectives, *others, "folder"])
        for trial in trials:
            values = [trial.overrides.get(key, "") for key in keys]
            values += [trial.metrics.get(name, "") for name in (*objectives, *others)]
            rows.writerow([trial.number, trial.status, f"{trial.seconds:.1f}", *values, str(trial.folder)])


def summarize(folder: Path, trials: list[Trial]) -> None:
    """Write sweep.csv and sweep.png, link the best trial as `best`, and print the table."""
    write_csv(folder, trials)
    best = best_trial(trials)
    if best is not None:
        link = folder / ".best.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(best.folder.name, target_is_directory=True)
        os.replace(link, folder / "best")
        draw(folder / "sweep.png", trials, swept_keys(trials))
        fill_hparams_tab(folder, trials, swept_keys(trials))
    keys = swept_keys(trials)
    objectives = list(dict.fromkeys(name for trial in trials for name in trial.objectives))
    table = Table(title=f"{len(trials)} trials, best by {objectives[0]}" if objectives else f"{len(trials)} trials")
    for name in ("trial", *keys, *objectives, "time", "status"):
        table.add_column(name)
    for trial in trials:
        minutes, seconds = divmod(round(trial.seconds), 60)
        values = [f"{trial.objectives[n]:.4g}" if n in trial.objectives else "-" for n in objectives]
        table.add_row(
            str(trial.number), *(trial.overrides.get(key, "-") for key in keys), *values, f"{minutes}:{seconds:02d}",
            trial.status, style="bold green" if trial is best else None if trial.status == "done" else "yellow",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"table       {folder / 'sweep.csv'}", soft_wrap=True)
    if best is not None:
        console.print(f"plot        {folder / 'sweep.png'}", soft_wrap=True)
        console.print(f"best        {folder / 'best'} -> trial {best.number}", soft_wrap=True)
    console.print(f"tensorboard --logdir {folder}", soft_wrap=True)


def fill_hparams_tab(folder: Path, trials: list[Trial], keys: list[str]) -> None:
    """Make the columns of TensorBoard's HParams tab in `folder` what was swept and what each trial is judged by.

    Without a record of the sweep the tab would show the first keys of the alphabet, and nothing of a pipeline's end.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    def writer(place: Path) -> SummaryWriter:
        for old in place.glob("*.sweep"):
            old.unlink()
        return SummaryWriter(str(place), filename_suffix=".sweep")

    columns, texts = {}, {}
    for key in keys:
        values = sorted({trial.overrides[key] for trial in trials if key in trial.overrides})
        name = key.rpartition(".set.")[2]
        columns[name] = 0.0 if all(map(is_number, values)) else values[0]
        texts |= {} if columns[name] == 0.0 else {name: values}
    metrics = dict.fromkeys((f"sweep/{name}" for trial in trials for name in trial.objectives), 0.0)
    with writer(folder) as events:
        events._get_file_writer().add_summary(hparams(columns, metrics, texts)[0])
    for trial in trials:
        for place in [*trial.folder.glob("tensorboard"), *trial.folder.glob("*/tensorboard")]:
            with writer(place) as events:
                for name, value in trial.objectives.items():
                    events.add_scalar(f"sweep/{name}", value)


def is_number(text: str) -> bool:
    """Return whether a swept value is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def draw(picture: Path, trials: list[Trial], keys: list[str]) -> None:
    """Draw the first objective against every swept value, and reward against KL where trials measured both."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [trial for trial in trials if trial.objectives]
    metric = next(iter(done[0].objectives))
    pairs = [(kl, reward) for kl in KLS for reward in REWARDS if all({kl, reward} <= t.metrics.keys() for t in done)]
    panels = (keys or ["trial"]) + ["frontier"] * bool(pairs)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3.6), squeeze=False, constrained_layout=True
    )
    for axis, key in zip(axes[0], panels, strict=True):
        axis.grid(alpha=0.3)
        if key == "frontier":
            draw_frontier(axis, done, keys, *pairs[0])
            continue
        values = [trial.overrides.get(key, str(trial.number)) for trial in done]
        places: list[Any] = [float(value) for value in values] if all(map(is_number, values)) else values
        points = sorted(zip(places, (trial.objectives.get(metric, math.nan) for trial in done), strict=True))
        axis.plot(*zip(*points, strict=True), "o-" if len(keys) == 1 else "o")
        axis.set(xlabel=key, ylabel=metric)
        numbers = [place for place in places if isinstance(place, float)]
        if numbers and min(numbers) > 0 and max(numbers) / min(numbers) > 20:
            axis.set_xscale("log")
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def draw_frontier(axis: Any, done: list[Trial], keys: list[str], kl: str, reward: str) -> None:
    """Draw reward against KL, a labelled point per trial."""
    points = sorted((trial.metrics[kl], trial.metrics[reward]) for trial in done)
    axis.plot(*zip(*points, strict=True), "-", color="tab:blue", alpha=0.3)
    for trial in done:
        label = ", ".join(f"{key.rpartition('.')[2]}={trial.overrides.get(key, '-')}" for key in keys)
        place = (trial.metrics[kl], trial.metrics[reward])
        axis.plot(*place, "o", color="tab:blue")
        axis.annotate(label, place, fontsize=7, xytext=(4, 4), textcoords="offset points")
    axis.set(xlabel=f"{kl} (nats per response)", ylabel=reward)
