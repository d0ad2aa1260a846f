"""How near the length-controlled win rate is to the published one: AlpacaEval 2.0, recomputed from its annotations.

    git clone https://github.com/tatsu-lab/alpaca_eval
    python benchmarks/alpaca_eval.py alpaca_eval

AlpacaEval has difficulties of prompts from a leaderboard of many models, and comparisons of the opponent with itself,
asked for long and for short responses. Here a model has its own comparisons, and those of a few others or of none.
"""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path

import numpy as np

from rlhf_lightning.evaluation.win_rates import Duel, difficulty, length_controlled

ANNOTATIONS = "weighted_alpaca_eval_gpt4_turbo"
BOARD = Path("src/alpaca_eval/leaderboards/data_AlpacaEval_2", f"{ANNOTATIONS}_leaderboard.csv")
BASELINE = "gpt4_1106_preview"


def read_duel(path: Path) -> Duel:
    """Return the comparisons of a model with the baseline; a preference of 1 is the baseline's win, 2 the model's."""
    rows = [row for row in json.loads(path.read_text()) if row["preference"] is not None]
    outcomes = [(row["preference"] or 1.5) - 1 for row in rows]
    lengths = [(len(row["output_2"]), len(row["output_1"])) for row in rows]
    return Duel(path.parents[1].name, BASELINE, "judge", outcomes, [row["instruction"] for row in rows], lengths)


def controlled(duel: Duel, others: list[Duel]) -> float:
    """Return the length-controlled win rate in percent."""
    values = np.asarray(duel.outcomes)
    return 100 * float(length_controlled(values, duel.lengths, difficulty(duel, others), np.ones((1, len(values))))[0])


def main(folder: Path) -> None:
    """Print both win rates of every model, and how far they are apart."""
    with (folder / BOARD).open() as file:
        board = {row[""]: row for row in csv.DictReader(file)}
    files = sorted((folder / "results").glob(f"*/{ANNOTATIONS}/annotations.json"))
    duels = [read_duel(file) for file in files if file.parents[1].name in board]
    duels = [duel for duel in duels if duel.model != BASELINE]
    few = random.Random(0).sample(duels, 4)
    rows = []
    for duel in duels:
        raw, published = (float(board[duel.model][key]) for key in ("win_rate", "length_controlled_winrate"))
        recounted = 100 * float(np.mean(duel.outcomes))
        assert abs(raw - recounted) < 0.01, duel.model
        rows.append((published, raw, controlled(duel, []), controlled(duel, few), controlled(duel, duels), duel.model))
    print(f"{'published':>10}{'raw':>8}{'alone':>8}{'four':>8}{'all':>8}  model")
    for *values, name in sorted(rows, reverse=True):
        print(f"{values[0]:>10.2f}" + "".join(f"{value:>8.2f}" for value in values[1:]) + f"  {name}")
    table = np.array([row[:-1] for row in rows])
    for place, name in enumerate(("raw", "alone", "with four others", "with all others"), 1):
        apart, correlation = np.abs(table[:, place] - table[:, 0]), np.corrcoef(table[:, place], table[:, 0])[0, 1]
        print(f"{name:<18} mean difference {apart.mean():.2f}, largest {apart.max():.2f}, r {correlation:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
