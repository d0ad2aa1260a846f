"""How good must a judge be? Runs `pipeline=rlaif_curve` for some seeds, and collects its curve.

    python benchmarks/rlaif.py --out rlaif

Every seed is a run of its own, resumed where it was stopped. The gold reward of PPO and DPO, with 95% intervals over
the seeds, goes to rlaif.json, rlaif.md and rlaif.png in the folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlhf_lightning.ops.statistics import Interval, mean_interval
from rlhf_lightning.world import gold

LEVELS = ("00", "10", "20", "30", "40")
METHODS = {"ppo": "PPO", "dpo": "DPO"}


def run(folder: Path, seed: int) -> Path:
    """Run the pipeline of a seed, or what is missing of it, and return its folder."""
    command = [sys.executable, "-m", "rlhf_lightning", "pipeline=rlaif_curve", f"seed={seed}", "resume=auto"]
    where = folder / f"seed_{seed}"
    where.mkdir(parents=True, exist_ok=True)
    subprocess.run(command, cwd=where, check=True)
    return newest(where)


def newest(folder: Path) -> Path:
    """Return the newest run of the pipeline below a folder."""
    return max((folder / "outputs" / "pipelines" / "rlaif_curve").iterdir())


def judge_accuracy(labels: Path) -> float:
    """Return the share of labels that agree with the gold reward; ties of either are left out."""
    right = []
    for line in labels.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        first, second = (gold(row, text).total for text in row["responses"])
        if first != second and len(set(row["ranking"])) == 2:
            right.append((first > second) == (row["ranking"][0] == 0))
    return sum(right) / len(right)


def figures(pipeline: Path) -> dict[str, Any]:
    """Return what one seed gives: SFT's gold reward, and by level accuracies and the gold rewards of PPO and DPO."""
    (evaluate,) = pipeline.glob("*_evaluate")
    metrics = json.loads((evaluate / "metrics.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {"sft": metrics["sft/gold"], "levels": {}}
    for level in LEVELS:
        (labels,) = pipeline.glob(f"*_judge_{level}/labels.jsonl")
        row = {"judge": judge_accuracy(labels), "reward": metrics[f"reward_{level}/accuracy"]}
        for method in METHODS:
            row |= {method: metrics[f"{method}_{level}/gold"], f"{method}_kl": metrics[f"{method}_{level}/kl"]}
        found["levels"][level] = row
    return found


def curve(seeds: list[dict[str, Any]]) -> dict[str, dict[str, Interval]]:
    """Return level -> figure -> mean over the seeds with its interval; `ppo` and `dpo` also as gains over SFT."""
    table: dict[str, dict[str, Interval]] = {}
    for level in LEVELS:
        rows = [seed["levels"][level] | {} for seed in seeds]
        for row, seed in zip(rows, seeds, strict=True):
            row |= {f"{method}_gain": row[method] - seed["sft"] for method in METHODS}
        table[level] = {name: mean_interval([row[name] for row in rows]) for name in rows[0]}
    return table


def markdown(table: dict[str, dict[str, Interval]], sft: Interval) -> str:
    """Return the curve as a table."""
    header = ["judge wrong", "judge accuracy", "reward model", "PPO", "PPO - SFT", "DPO", "DPO - SFT"]
    lines = [header, ["---"] * len(header)]
    for level, row in table.items():
        cells = [f"{row['judge'][0]:.3f}", f"{row['reward'][0]:.3f}"]
        cells += [text(row[name]) for name in ("ppo", "ppo_gain", "dpo", "dpo_gain")]
        lines.append([f"{int(level)}%", *cells])
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{body}\n\nSFT: {text(sft)}\n"


def text(interval: Interval) -> str:
    mean, low, high = interval
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def draw(table: dict[str, dict[str, Interval]], sft: Interval, path: Path) -> None:
    """Draw gold reward against the judge's accuracy."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 3.5), dpi=120)
    for method, title in METHODS.items():
        x = [row["judge"][0] for row in table.values()]
        y = [row[method][0] for row in table.values()]
        below = [row[method][0] - row[method][1] for row in table.values()]
        above = [row[method][2] - row[method][0] for row in table.values()]
        axes.errorbar(x, y, yerr=[below, above], marker="o", capsize=3, label=title)
    axes.axhline(sft[0], color="gray", linestyle="--", label="SFT")
    axes.set_xlabel("accuracy of the judge")
    axes.set_ylabel("gold reward, held-out prompts")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("rlaif"))
    parser.add_argument("--collect", type=Path, nargs="+", help="run folders that are done, in place of running seeds")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    found = [figures(folder) for folder in given.collect or [run(given.out, seed) for seed in given.seeds]]
    table, sft = curve(found), mean_interval([seed["sft"] for seed in found])
    (given.out / "rlaif.json").write_text(json.dumps({"seeds": found, "curve": table, "sft": sft}, indent=2) + "\n")
    (given.out / "rlaif.md").write_text(markdown(table, sft))
    draw(table, sft, given.out / "rlaif.png")
    print(markdown(table, sft))


if __name__ == "__main__":
    main()
