"""benchmarks/online.py runs GRPO beside TRL's trainer, and its own checks of sameness pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.modules.offline import WORDS
from tests.oracle.side_by_side import start

pytest.importorskip("trl", reason="TRL is absent: pip install 'rlhf-lightning[oracle]'")
pytestmark = [pytest.mark.oracle, pytest.mark.slow, pytest.mark.nightly]
PROGRAM = Path(__file__).parents[1] / "benchmarks" / "online.py"


def test_one_counted_step_of_grpo(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"{a} {b}"}]} for a in WORDS for b in WORDS]
    data, out = tmp_path / "prompts.jsonl", tmp_path / "online.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable, str(PROGRAM), "grpo", "--model", start(tmp_path), "--data", str(data), "--steps", "1",
        "--new-tokens", "8", "--settings", "default", "--lengths", "fixed", "--out", str(out),
    ]  # fmt: skip
    # one thread: on a busy machine two that wait for each other take minutes over a model this small
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(out.read_text())["results"]
    ours, theirs = result["steps"]
    assert len(ours) == len(theirs) == 2
    assert [step["prompt_tokens"] for step in ours] == [step["prompt_tokens"] for step in theirs]
    assert all(step["lengths"] == [8] * 16 for step in ours + theirs)
    # at equal lengths the mean advantage is 0, and so is the loss of a policy that has not moved
    assert abs(ours[0]["loss"]) < 1e-6
    assert abs(theirs[0]["loss"]) < 1e-6
    assert result["ratio"] > 0
