"""`trainer.devices=2` from the plain command is the experiment of one device: the same rows, losses and weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_cli import SMALL, rlhf

pytestmark = [pytest.mark.slow, pytest.mark.dist]
TWO = ["strategy=ddp", "trainer.devices=2"]
STAGES = {
    "sft": [],
    "reward": [],
    "dpo": ["dpo.beta=0.5"],
    "ppo": ["reward_from=rewards:length", "ppo.max_new_tokens=4", "ppo.inner_epochs=2", "ppo.missing_eos_penalty=0"],
}
REWARD = "def length(prompts, responses, metadata):\n    return [float(len(r) % 5) for r in responses]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs of unequal length, a reward and an SFT model."""
    folder = tmp_path_factory.mktemp("ddp")
    rows = [
        {"prompt": f"Say {i}.", "chosen": f"It is {i}." + " Yes." * (i % 3), "rejected": f"No, {i + 1}!"}
        for i in range(16)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARD)
    rlhf(folder, "stage=sft", "data=preferences/jsonl", "data.train=pairs.jsonl", "max_steps=1", "name=start", *SMALL)
    return folder


def start(folder: Path) -> Path:
    return next((folder / "outputs" / "sft" / "start").iterdir()) / "model"


def run(folder: Path, stage: str, name: str, *more: str) -> Path:
    data = "prompts/jsonl" if stage == "ppo" else "preferences/jsonl"
    rlhf(
        folder, f"stage={stage}", f"init_from={start(folder)}", f"data={data}",
        "data.train=pairs.jsonl", "data.val=pairs.jsonl", "data.batch_size=8", "max_epochs=9", "max_steps=4",
        "optimizer.lr=1e-3", f"name={name}", *STAGES[stage], *more,
    )  # fmt: skip
    return next((folder / "outputs" / stage / name).iterdir())


def series(run: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_learn_what_one_learns(stage: str, folder: Path) -> None:
    one, two = run(folder, stage, "one"), run(folder, stage, "two", *TWO)
    tags = ["policy/loss", "reward/proxy", "kl/reference", "value/loss"] if stage == "ppo" else ["train/loss"]
    for tag in [*tags, "optim/grad_norm"]:
        assert series(two, tag) == pytest.approx(series(one, tag), rel=1e-4, abs=1e-5), tag
    first, second = (load_file(r / "model" / "model.safetensors") for r in (one, two))
    for name, weight in first.items():
        # two ranks add the same gradients in another order; four Adam steps of 1e-3 carry the rounding into the weights
        torch.testing.assert_close(second[name], weight, rtol=1e-5, atol=2e-5, msg=name)
    assert len(list(two.glob("*.log"))) == 2  # one a rank
    metrics = [json.loads((r / "metrics.json").read_text()) for r in (one, two)]
    assert metrics[1]["global_step"] == metrics[0]["global_step"] == 4


def test_a_rank_that_fails_ends_the_run(folder: Path) -> None:
    code = "import os\ndef broken(prompts, *rest):\n    assert os.environ.get('LOCAL_RANK', '0') == '0', 'rank 1 broke'\n    return [0.0] * len(prompts)\n"
    (folder / "rewards2.py").write_text(code)
    arguments = [
        "stage=ppo",
        f"init_from={start(folder)}",
        "data.train=pairs.jsonl",
        "name=broken",
    ]
    done = rlhf(folder, *arguments, "reward_from=rewards2:broken", *TWO, code=None)
    assert "rank 1 broke" in done.stderr
    assert not os.path.exists(folder / "outputs" / "ppo" / "broken" / "model")
