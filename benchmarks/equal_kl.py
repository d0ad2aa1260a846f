"""Gold reward at equal KL of PPO, DPO, online DPO and best-of-n: `rlhf pipeline=online` for several seeds.

    python benchmarks/equal_kl.py                        # runs what is missing, then prints the tables
    python benchmarks/equal_kl.py --runs a b c           # reads the run folders of finished pipelines

KL and gold reward along training are those of the responses that the policy learned from, before each iteration's
update; at a level they are a mean over the iterations whose KL is near it, weighted by a triangle.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_lightning.ops.statistics import mean_interval

LEVELS, WIDTH, LEAST = (0.25, 0.5, 0.75, 1.0), 0.25, 3
LEARNERS, POLICIES = ("ppo", "online_dpo"), ("sft", "ppo", "dpo", "online_dpo")
BEST_OF = ("model", "model_bo2", "model_bo4", "model_bo8", "model_bo16")
Curve = list[tuple[float, float]]
Cells = Mapping[str, Sequence[float | None]]


def stage(run: Path, name: str) -> Path:
    """Return the folder of a stage in the run folder of a pipeline."""
    return next(path for path in run.iterdir() if re.fullmatch(rf"(\d+_)?{name}", path.name))


def curve(folder: Path) -> Curve:
    """Return (KL, gold reward) of every iteration of a training run."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    kl, gold = ([event.value for event in events.Scalars(tag)] for tag in ("kl/reference", "reward/gold"))
    return list(zip(kl, gold, strict=True))


def at(points: Curve, level: float) -> float | None:
    """Return the mean gold reward near a level of KL; None where fewer than `LEAST` iterations are near."""
    near = [(1 - abs(kl - level) / WIDTH, gold) for kl, gold in points if abs(kl - level) < WIDTH]
    return sum(w * gold for w, gold in near) / sum(w for w, _ in near) if len(near) >= LEAST else None


def shown(values: Sequence[float | None], digits: int = 2) -> str:
    """Return the mean over seeds with its 95% interval (Student's t), and the seeds."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "-" if not known else " / ".join("-" if v is None else f"{v:.{digits}f}" for v in values)
    mean, low, high = mean_interval(known, list(range(len(known))))
    inside = f" [{low:.{digits}f}, {high:.{digits}f}]" if len(known) > 1 else ""
    return f"{mean:.{digits}f}{inside} ({', '.join(f'{value:.{digits}f}' for value in known)})"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [title, "", "| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


def along_training(runs: Sequence[Path]) -> str:
    """Return the table of gold reward at levels of KL, with differences paired over the seeds."""
    curves = {name: [curve(stage(run, name)) for run in runs] for name in LEARNERS}
    rows = []
    for level in LEVELS:
        cells = {name: [at(points, level) for points in curves[name]] for name in LEARNERS}
        pairs = zip(*(cells[name] for name in LEARNERS), strict=True)
        gaps = [None if ppo is None or online is None else online - ppo for ppo, online in pairs]
        rows.append([f"{level:g}", *(shown(cells[name]) for name in LEARNERS), shown(gaps)])
    return table("Gold reward along training", ["KL", *LEARNERS, "difference"], rows)


def held_out(runs: Sequence[Path], name: str, policies: Sequence[str]) -> str:
    """Return the table of one of the evaluations: gold reward, KL, score and length."""
    metrics = [json.loads((stage(run, name) / "metrics.json").read_text()) for run in runs]
    rows = []
    for policy in policies:
        columns = [[m.get(f"{policy}/{metric}") for m in metrics] for metric in ("gold", "kl", "reward", "length")]
        rows.append([policy, *(shown(column, digits) for column, digits in zip(columns, (2, 2, 2, 1), strict=True))])
    return table(f"Held-out prompts: {name}", ["policy", "gold reward", "KL", "reward model", "tokens"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="run folders of pipeline=online, instead")
    parser.add_argument("--out", type=Path, default=Path("outputs/equal_kl"), help="where the pipelines run")
    options = parser.parse_args()
    runs = options.runs or [options.out / f"seed_{seed}" for seed in options.seeds]
    for seed, run in zip(options.seeds, runs if not options.runs else (), strict=False):
        arguments = ["pipeline=online", f"seed={seed}", f"hydra.run.dir={run}", "resume=auto"]
        subprocess.run([sys.executable, "-m", "rlhf_lightning", *arguments], check=True)
    parts = [along_training(runs), held_out(runs, "evaluate", POLICIES), held_out(runs, "best_of_n", BEST_OF)]
    Console().print("\n".join(parts), soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
