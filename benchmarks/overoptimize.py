"""The fits of Gao et al. 2022 on the built-in world: `rlhf pipeline=overoptimize` for several seeds, and what they say.

    python benchmarks/overoptimize.py --out overoptimize                  # runs what is missing, then the tables
    python benchmarks/overoptimize.py --out overoptimize --runs a b c     # reads run folders of finished pipelines

Every figure is a mean over the seeds with its 95% interval (Student's t), paired within a seed where two are compared.
Tables go to overoptimize.md, the curves to best_of_n.svg and policies.svg in the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_lightning.ops.statistics import mean_interval

MODELS, DATA = (32, 64, 128), (256, 1024, 4096)
METHODS = {"best_of_n": "best-of-n", "ppo": "PPO", "dpo": "DPO"}
COLORS = {"best_of_n": "#555555", "ppo": "#0072b2", "dpo": "#d55e00", 256: "#e69f00", 1024: "#56b4e9", 4096: "#009e73"}
LINES = {32: ":", 64: "--", 128: "-"}
Rows = list[dict[str, Any]]


def run(folder: Path, seed: int) -> Path:
    """Run the pipeline of a seed, or what is missing of it, and return its folder."""
    place = folder.resolve() / f"seed_{seed}"
    arguments = ["pipeline=overoptimize", f"seed={seed}", f"hydra.run.dir={place}", "resume=auto"]
    subprocess.run([sys.executable, "-m", "rlhf_lightning", *arguments], check=True)
    return place


def read(pipeline: Path, name: str) -> Rows:
    """Return a table of the pipeline's last stage."""
    (place,) = (path for path in pipeline.glob("*_overoptimize") if path.is_dir())
    return [json.loads(line) for line in (place / "tables" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean over seeds and its interval."""
    mean, low, high = mean_interval(values)
    return f"{mean:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if math.isfinite(low) else "")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]) + "\n"


def accuracies(pipeline: Path) -> dict[str, float]:
    """Return the held-out accuracy of every reward model."""
    folders = (path for path in pipeline.glob("*_rm_*") if path.is_dir() and ".old" not in path.name)
    return {f.name.partition("_")[2]: json.loads((f / "metrics.json").read_text())["val/accuracy"] for f in folders}


# ---- tables --------------------------------------------------------------------------------------------------------


def coefficients(runs: Sequence[Path], method: str) -> str:
    """Return a, b, R^2 and the peak of one method, by reward model."""
    fits = [{row["proxy"]: row for row in read(run, "fits") if row["method"] == method} for run in runs]
    points = [read(run, "overoptimization") for run in runs]
    accuracy = [accuracies(run) for run in runs]
    rows = []
    for proxy in sorted(fits[0], key=lambda name: [int(part) for part in name.split("_")[1:]]):
        peaks = [top(rows, method, proxy) for rows in points]
        last = [end(rows, method, proxy) for rows in points]
        fitted = [[fit[proxy][key] for fit in fits] for key in ("a", "b", "r2")]
        peak = [[row[key] for row in peaks] for key in ("kl", "gold_reward")]
        lost = [p["gold_reward"] - row["gold_reward"] for p, row in zip(peaks, last, strict=True)]
        columns = [[a[proxy] for a in accuracy], *fitted, *peak, lost]
        rows.append([*proxy.split("_")[1:], *(shown(values) for values in columns)])
    header = ["width", "pairs", "accuracy", "a", "b", "R²", "KL at the peak", "gold at the peak", "lost at the end"]
    return f"{METHODS[method]}\n\n{table(header, rows)}"


def of(rows: Rows, method: str, proxy: str) -> Rows:
    """Return the points of a curve, in ascending KL."""
    return sorted((r for r in rows if (r["method"], r["proxy"]) == (method, proxy)), key=lambda row: row["kl"])


def top(rows: Rows, method: str, proxy: str) -> dict[str, Any]:
    """Return the point with the highest gold reward."""
    return max(of(rows, method, proxy), key=lambda row: row["gold_reward"])


def end(rows: Rows, method: str, proxy: str) -> dict[str, Any]:
    """Return the point with the largest KL."""
    return of(rows, method, proxy)[-1]


def slopes(runs: Sequence[Path]) -> str:
    """Return how a and b of best-of-n move with each doubling of data and of the width of the reward model."""
    found: dict[str, list[list[float]]] = {"a": [], "b": []}
    for pipeline in runs:
        fits = [row for row in read(pipeline, "fits") if row["method"] == "best_of_n"]
        sizes = np.array([[1.0, *(math.log2(int(part)) for part in row["proxy"].split("_")[1:])] for row in fits])
        for name, values in found.items():
            values.append(np.linalg.lstsq(sizes, np.array([row[name] for row in fits]), rcond=None)[0][1:].tolist())
    rows = [[f"per doubling of {size}", *(shown([v[place] for v in found[name]], 3) for name in found)]
            for place, size in enumerate(("width", "pairs"))]  # fmt: skip
    return f"Best-of-n, change of the coefficients\n\n{table(['', 'a', 'b'], rows)}"


def at_equal_kl(runs: Sequence[Path], levels: Sequence[float] = (0.5, 1.0, 2.0)) -> str:
    """Return gold reward of the methods at levels of KL, the mean over the reward models that all have."""
    proxies = sorted({row["proxy"] for row in read(runs[0], "fits") if row["method"] == "ppo"})
    cells: dict[str, list[str]] = {}
    for method in METHODS:
        cells[method] = []
        for level in levels:
            values = []
            for pipeline in runs:
                rows = read(pipeline, "overoptimization")
                curves = [of(rows, method, proxy) for proxy in proxies]
                reached = [c for c in curves if c[-1]["kl"] >= level]
                values += (
                    [float(np.mean([along(curve, level) for curve in reached]))] if len(reached) == len(curves) else []
                )
            cells[method].append(shown(values) if len(values) == len(runs) else "not reached by all")
    rows = [[METHODS[method], *row] for method, row in cells.items()]
    return f"Gold reward at equal KL\n\n{table(['', *(f'{level:g} nats' for level in levels)], rows)}"


def along(curve: Rows, level: float) -> float:
    """Return the gold reward of a curve at a KL, between two policies by interpolation in d."""
    d = [math.sqrt(max(row["kl"], 0.0)) for row in curve]
    return float(np.interp(math.sqrt(level), d, [row["gold_reward"] for row in curve]))


# ---- figures -------------------------------------------------------------------------------------------------------


def draw(runs: Sequence[Path], folder: Path) -> None:
    """Draw best-of-n by all reward models, and the methods by those that all have."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    points = [read(run, "overoptimization") for run in runs]
    figure, pair = plt.subplots(1, 2, figsize=(8, 3.2))
    for axes, key, title in zip(pair, ("gold_reward", "proxy_reward"), ("gold reward", "proxy reward"), strict=True):
        for model in MODELS:
            for data in DATA:
                curves = [of(rows, "best_of_n", f"rm_{model}_{data}") for rows in points]
                d = [math.sqrt(row["kl"]) for row in curves[0]]
                mean = np.mean([[row[key] for row in curve] for curve in curves], 0)
                axes.plot(d, mean, LINES[model], color=COLORS[data], label=f"{model}, {data}")
        axes.set(xlabel="d = √KL", title=f"{title}, best-of-n")
    pair[0].legend(title="width, pairs", fontsize=7, ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "best_of_n.svg")
    proxies = sorted({row["proxy"] for row in points[0] if row["method"] == "ppo"})
    figure, row = plt.subplots(1, len(proxies), figsize=(2.2 * len(proxies), 2.8), sharey=True)
    for axes, proxy in zip(row, proxies, strict=True):
        for method, title in METHODS.items():
            for rows in points:
                curve = of(rows, method, proxy)
                d = [math.sqrt(max(point["kl"], 0)) for point in curve]
                style = "-" if method == "best_of_n" else "o-"
                label = title if rows is points[0] else None
                axes.plot(d, [point["gold_reward"] for point in curve], style, color=COLORS[method], label=label,
                          markersize=2, linewidth=0.8)  # fmt: skip
        axes.set(xlabel="d = √KL", title="width {1}, pairs {2}".format(*proxy.split("_")))
        axes.title.set_fontsize(9)
    row[0].set_ylabel("gold reward")
    row[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "policies.svg")


def report(runs: Sequence[Path]) -> str:
    """Return all tables."""
    return "\n".join([*(coefficients(runs, method) for method in METHODS), slopes(runs), at_equal_kl(runs)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("overoptimize"))
    parser.add_argument("--runs", type=Path, nargs="+", help="run folders that are done, in place of running seeds")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    runs: Sequence[Path] = given.runs or [run(given.out, seed) for seed in given.seeds]
    text = report(runs)
    (given.out / "overoptimize.md").write_text(text, encoding="utf-8")
    draw(runs, given.out)
    print(text)


if __name__ == "__main__":
    main()
