"""The frontier of reward and KL for PPO, DPO, fine-tuning on preferred responses and best-of-n on short stories.

    python benchmarks/frontier.py --model <stories260K> --out frontier

Runs `pipeline=frontier` with the sentiment of the story as reward (pip install vaderSentiment), resumed where it was
stopped, and draws its table `frontier` into frontier.svg. Opening lines of stories are the prompts; those of the last
names are held out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlhf_lightning.evaluation.overoptimization import BEST_OF_N

OPENINGS = [
    "{} had a", "One day, {} saw a", "{} wanted to", "{} found a box. In the box", "{} went to the park and",
    "It was raining. {}", "{} and the dog", "Every night {}", "{} lost a toy. Then", "In the garden, {}",
    "{} heard a noise. It was", "Mom told {} that", "{} made a cake, but", "A big bird came to {}",
    "{} was sad because", "{} could not sleep. So",
]  # fmt: skip
NAMES = [
    "Tom", "Lily", "Ben", "Mia", "Sam", "Sue", "Tim", "Anna", "Max", "Lucy", "Jack", "Amy", "Bob", "Ella", "Leo",
    "Sara", "Dan", "Zoe", "Joe", "Kim", "Pete", "Nina", "Fred", "Rose",
]  # fmt: skip
HELD_OUT = 8
COLORS = {"best_of_n": "#555555", "ppo": "#0072b2", "dpo": "#d55e00", "sft": "#009e73"}
LABELS = {"best_of_n": "best-of-n", "ppo": "PPO", "dpo": "DPO", "sft": "preferred-FT"}


def write_prompts(folder: Path) -> None:
    """Write train.jsonl.gz and test.jsonl.gz."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, names in (("train", NAMES[:-HELD_OUT]), ("test", NAMES[-HELD_OUT:])):
        rows = [json.dumps({"text": opening.format(name)}) for name in names for opening in OPENINGS]
        with gzip.GzipFile(folder / f"{split}.jsonl.gz", "wb", mtime=0) as file:  # the same bytes every time
            file.write("\n".join(rows).encode())


def run(model: str, folder: Path, seed: int) -> Path:
    """Run the pipeline, or what is missing of it, and return the folder of its evaluation."""
    write_prompts(folder / "prompts")
    arguments = [
        "pipeline=frontier", f"init_from={model}", "reward_from=sentiment:sentiment", f"seed={seed}",
        f"data_root={folder.resolve() / 'prompts'}", f"hydra.run.dir={folder.resolve() / 'run'}", "resume=auto",
    ]  # fmt: skip
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent.resolve()), os.environ.get("PYTHONPATH")]))
    subprocess.run(
        [sys.executable, "-m", "rlhf_lightning", *arguments], check=True, env=os.environ | {"PYTHONPATH": paths}
    )
    (place,) = (folder / "run").glob("*_overoptimize")
    return place


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw reward against KL; vertical lines are 95% intervals."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 3.5))
    for method in dict.fromkeys(row["method"] for row in rows):
        points = sorted((row for row in rows if row["method"] == method), key=lambda row: row["kl"])
        x, y = [row["kl"] for row in points], [row["reward"] for row in points]
        style: dict[str, Any] = {"color": COLORS[method], "label": LABELS[method]}
        if method == BEST_OF_N:
            axes.plot(x, y, **style)
            axes.fill_between(
                x, [r["low"] for r in points], [r["high"] for r in points], color=COLORS[method], alpha=0.15
            )
        else:
            ends = [[row["reward"] - row["low"] for row in points], [row["high"] - row["reward"] for row in points]]
            axes.errorbar(x, y, yerr=ends, fmt="o", markersize=4, linewidth=1, **style)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("KL to the model at the start (nats per response)")
    axes.set_ylabel("sentiment of the story")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a base model of short stories")
    parser.add_argument("--out", type=Path, default=Path("frontier"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows = read(run(given.model, given.out, given.seed) / "tables" / "frontier.jsonl")
    draw(rows, given.out / "frontier.svg")


if __name__ == "__main__":
    main()
