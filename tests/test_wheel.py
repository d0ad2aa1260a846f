"""The wheel works from any folder: configuration included, two updates outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rlhf_lightning.stages import STAGES

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def test_wheel_installs_and_runs_outside_the_checkout(tmp_path: Path) -> None:
    def run(*command: str, **extra: str) -> str:
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"} | extra
        done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    # without isolation: the build back end is in the environment, and nothing needs to be downloaded
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {n.removeprefix("rlhf_lightning/conf/") for n in names if n.startswith("rlhf_lightning/conf/")}
    assert {str(f.relative_to(ROOT / "conf")) for f in (ROOT / "conf").rglob("*.yaml")} <= shipped
    assert "rlhf_lightning/world/world.yaml" in names
    static = ROOT / "rlhf_lightning" / "feedback" / "labeling" / "static"
    assert {f"rlhf_lightning/feedback/labeling/static/{file.name}" for file in static.iterdir()} <= set(names)
    templates = ROOT / "rlhf_lightning" / "evaluation" / "report" / "templates"
    assert {f"rlhf_lightning/evaluation/report/templates/{file.name}" for file in templates.iterdir()} <= set(names)
    # a clean environment that borrows the installed dependencies but not this project
    run(sys.executable, "-m", "venv", "--without-pip", "env")
    python = str(tmp_path / "env" / "bin" / "python")
    site = subprocess.run(
        [sys.executable, "-c", "import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])"],
        text=True, capture_output=True, check=True,
    ).stdout.strip()  # fmt: skip
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", str(wheel))
    target = run(python, "-c", "import rlhf_lightning; print(rlhf_lightning.__file__)").strip()
    assert target.startswith(str(tmp_path / "env"))
    command = str(tmp_path / "env" / "bin" / "rlhf")
    assert "stage: sft" in run(command, "stage=sft", "--cfg", "job", PYTHONPATH=site)
    compositions = "\n".join(
        [
            "from hydra import compose, initialize_config_module",
            "with initialize_config_module('rlhf_lightning.conf', version_base='1.3'):",
            f"    print([compose('rlhf', overrides=['stage=' + stage]).stage for stage in {list(STAGES)}])",
        ]
    )
    assert run(python, "-c", compositions, PYTHONPATH=site).strip() == str(list(STAGES))
    run(
        command,
        "experiment=sft_world",
        "debug=fast",
        "data.world.rows=200",
        f"paths.cache={tmp_path}/cache",
        PYTHONPATH=site,
    )
    (run_folder,) = (tmp_path / "outputs" / "sft" / "world").iterdir()
    assert (run_folder / "model" / "manifest.json").is_file()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What is 2 + 2?"}\n' * 3)
    run(
        command, "stage=candidates", f"init_from={run_folder / 'model'}", "data.train=prompts.jsonl",
        "candidates.num_generations=2", "candidates.max_new_tokens=4", "hydra.run.dir=candidates",
        f"paths.cache={tmp_path}/cache", PYTHONPATH=site,
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "candidates" / "candidates.jsonl").read_text().splitlines()]
    assert [len(row["responses"]) for row in rows] == [2, 2, 2]
