"""What benchmarks/rlaif.py makes of runs, and benchmarks/xstest.py of prompts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from rlhf_lightning.world import rows


def script(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def finished(folder: Path, wrong: int, gold: float) -> Path:
    """Write what the curve reads of a run in which every judge is wrong about `wrong` of 10 pairs."""
    bench = script("rlaif")
    prompts = [row for row in rows("prompts", 60) if row["family"] == "fact"][:10]
    metrics = {"sft/gold": 0.1}
    for number, level in enumerate(bench.LEVELS):
        labels = []
        for i, row in enumerate(prompts):
            ranking = [1, 0] if i < wrong else [0, 1]
            labels.append(row | {"responses": [row["ideal"], "Nowhere."], "ranking": ranking})
        labels.append(prompts[0] | {"responses": ["a", "b"], "ranking": [0, 1]})  # equal by gold: no mistake
        labels.append(prompts[0] | {"responses": [prompts[0]["ideal"], "b"], "ranking": [0, 0]})  # a tie
        part = folder / f"3_judge_{level}"
        part.mkdir(parents=True)
        (part / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
        metrics |= {f"reward_{level}/accuracy": 0.8}
        for method in bench.METHODS:
            metrics |= {f"{method}_{level}/gold": gold - 0.1 * number, f"{method}_{level}/kl": 1.0}
    (folder / "24_evaluate").mkdir()
    (folder / "24_evaluate" / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_the_curve_has_accuracies_gains_and_intervals_over_seeds(tmp_path: Path) -> None:
    bench = script("rlaif")
    seeds = [bench.figures(finished(tmp_path / str(i), 2, gold)) for i, gold in enumerate((0.5, 0.6, 0.7))]
    table = bench.curve(seeds)
    assert list(table) == list(bench.LEVELS)
    assert table["00"]["judge"][0] == pytest.approx(0.8)
    assert table["20"]["ppo"][0] == pytest.approx(0.4)
    assert table["20"]["ppo_gain"][0] == pytest.approx(0.3)
    mean, low, high = table["00"]["dpo"]
    assert (mean, high - mean) == pytest.approx((0.6, 4.3027 * 0.1 / 3**0.5), abs=1e-4)  # Student's t, two degrees
    assert mean - low == pytest.approx(high - mean)
    lines = bench.markdown(table, (0.1, 0.0, 0.2)).splitlines()
    assert lines[2].startswith("| 0% | 0.800 | 0.800 | 0.600 [")
    assert len(lines) == 2 + 5 + 2


def test_prompts_are_split_without_overlap_and_evenly() -> None:
    types = [("safe", "a"), ("safe", "b"), ("unsafe", "c"), ("unsafe", "d"), ("unsafe", "e")]
    prompts = [{"id": f"{kind}{i}", "label": label, "type": kind} for label, kind in types for i in range(20)]
    parts = script("xstest").split(prompts, 12, seed=0)
    names = {part: {row["id"] for row in members} for part, members in parts.items()}
    assert not names["train"] & names["test"]
    for members in parts.values():
        assert len(members) == 24
        counts = [sum(row["type"] == kind for row in members) for _, kind in types]
        assert counts == [6, 6, 4, 4, 4]
    assert parts == script("xstest").split(prompts, 12, seed=0)
    assert parts != script("xstest").split(prompts, 12, seed=1)
