"""What benchmarks/overoptimize.py and benchmarks/frontier.py make of finished runs."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from tests.test_benchmarks_rlaif import script

A, B = {256: 0.6, 1024: 0.9, 4096: 1.2}, {32: 0.5, 64: 0.4, 128: 0.3}


def finished(folder: Path, shift: float) -> Path:
    """Write what the script reads of a pipeline whose coefficients are linear in the doublings of both sizes."""
    points, fits = [], []
    for model, b in B.items():
        for data, a in A.items():
            proxy = f"rm_{model}_{data}"
            (folder / f"1_{proxy}").mkdir(parents=True)
            (folder / f"1_{proxy}" / "metrics.json").write_text(json.dumps({"val/accuracy": 0.8}))
            for method in ("best_of_n", "ppo", "dpo") if model == 64 else ("best_of_n",):
                row = {"method": method, "proxy": proxy}
                fits.append(row | {"a": a + shift, "b": b, "r2": 0.9})
                for kl in (0.0, 0.25, 1.0, 2.25, 4.0):
                    d = math.sqrt(kl)
                    points.append(row | {"kl": kl, "gold_reward": d * (a + shift - b * d), "proxy_reward": d})
    (folder / "2_overoptimize" / "tables").mkdir(parents=True)
    for name, rows in (("overoptimization", points), ("fits", fits)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "2_overoptimize" / "tables" / f"{name}.jsonl").write_text(text)
    return folder


def test_the_tables_of_three_seeds(tmp_path: Path) -> None:
    bench = script("overoptimize")
    runs = [finished(tmp_path / str(seed), shift) for seed, shift in enumerate((-0.1, 0.0, 0.1))]
    best = bench.coefficients(runs, "best_of_n").splitlines()
    assert len(best) == 2 + 2 + 9
    assert best[4].startswith("| 32 | 256 | 0.80 [0.80, 0.80] | 0.60 [0.35, 0.85] | 0.50 [0.50, 0.50] | 0.90")
    assert len(bench.coefficients(runs, "ppo").splitlines()) == 2 + 2 + 3
    slopes = bench.slopes(runs)
    assert "| per doubling of width | 0.000 [0.000, 0.000] | -0.100 [-0.100, -0.100] |" in slopes.replace(
        "-0.000", "0.000"
    )
    assert "| per doubling of pairs | 0.150 [0.150, 0.150] | 0.000 [0.000, 0.000] |" in slopes.replace(
        "-0.000", "0.000"
    )
    # at 1 nat the mean over the three sizes of data of a - b, between the points at d = 0.5 and 1.5
    assert "| PPO | " in bench.at_equal_kl(runs, (1.0, 9.0))
    assert "0.50 [0.25, 0.75] | not reached by all |" in bench.at_equal_kl(runs, (1.0, 9.0))


@pytest.mark.slow
def test_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bench = script("overoptimize")
    bench.draw([finished(tmp_path / str(seed), 0.1 * seed) for seed in range(2)], tmp_path)
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("best_of_n.svg", "policies.svg"))
    row = {"method": "best_of_n", "kl": 0.5, "reward": 0.2, "low": 0.1, "high": 0.3}
    frontier = script("frontier")
    frontier.draw([row, row | {"kl": 1.0}, row | {"method": "ppo"}], tmp_path / "frontier.svg")
    assert (tmp_path / "frontier.svg").stat().st_size > 5000


def test_held_out_names_are_in_no_training_prompt(tmp_path: Path) -> None:
    bench = script("frontier")
    bench.write_prompts(tmp_path)
    first = (tmp_path / "train.jsonl.gz").read_bytes()
    train, test = (
        gzip.decompress((tmp_path / f"{split}.jsonl.gz").read_bytes()).decode() for split in ("train", "test")
    )
    assert len(train.splitlines()) + len(test.splitlines()) == len(bench.NAMES) * len(bench.OPENINGS)
    assert not any(name in train for name in bench.NAMES[-bench.HELD_OUT :])
    bench.write_prompts(tmp_path)
    assert (tmp_path / "train.jsonl.gz").read_bytes() == first
