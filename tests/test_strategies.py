"""`trainer.devices=2` from the plain command is the experiment of one device, under every strategy a CPU can run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.cli import SMALL, environment, rlhf

pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.xdist_group("strategies")]
TWO = ["strategy=ddp", "trainer.devices=2"]
STRATEGIES = ("ddp", "fsdp2", "tensor_parallel")
STAGES = {
    "sft": [],
    "reward": [],
    "groups": ["reward.groups=[a,b]"],
    "dpo": ["dpo.beta=0.5"],
    # so few tokens a pass that the ranks need different numbers of passes, in sampling and in learning
    "ppo": [
        "ppo.max_new_tokens=6",
        "ppo.ppo_epochs=2",
        "ppo.num_minibatches=2",
        "ppo.microbatch_tokens=48",
        "sampler.batch_tokens=48",
        "ppo.critic_warmup=1",
    ],
    "rloo": ["rloo.max_new_tokens=6", "rloo.num_generations=2"],
    "grpo": ["grpo.max_new_tokens=6", "grpo.num_generations=2", "adapter=lora"],
    "online_dpo": [
        "online_dpo.max_new_tokens=6",
        "online_dpo.microbatch_tokens=48",
        "online_dpo.num_minibatches=3",
        "online_dpo.beta=0.5",
    ],
}
UPDATES = {"ppo": 8, "online_dpo": 6}  # two iterations; of the others four
STAGE_OF = {"groups": "reward"}  # the others are called like the stage
ONLINE = ("ppo", "rloo", "grpo", "online_dpo")
PER_COMMIT = {("dpo", "ddp"), ("dpo", "fsdp2"), ("ppo", "fsdp2"), ("ppo", "tensor_parallel")}  # the rest at night
BROKEN = """
import os, time
from pathlib import Path

def broken(prompts, *rest):
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return [0.0] * len(prompts)
    Path("broke").write_text(str(time.time()))
    raise ValueError("rank 1 broke")
"""
REWARD = "def length(prompts, responses, metadata):\n    return [float(len(r) % 5) for r in responses]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs of unequal length, a reward and an SFT model."""
    folder = tmp_path_factory.mktemp("ddp")
    rows = [
        {
            "prompt": f"Say {i}.",
            "chosen": f"It is {i}." + " Yes." * (i % 3),
            "rejected": f"No, {i + 1}!",
            "group": "ab"[i % 2],
        }
        for i in range(16)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARD)
    rlhf(
        folder,
        "stage=sft",
        "data=preferences/jsonl",
        "data.train=pairs.jsonl",
        "max_steps=1",
        "name=start",
        *SMALL,
        "model.build.layers=2",
    )
    return folder


def start(folder: Path) -> Path:
    return next((folder / "outputs" / "sft" / "start").iterdir()) / "model"


def run(folder: Path, stage: str, name: str, *more: str) -> Path:
    data = "prompts/jsonl" if stage in ONLINE else "preferences/jsonl"
    if stage in ONLINE:
        more = ("reward_from=rewards:length", f"{stage}.missing_eos_penalty=0", *more)
    rlhf(
        folder, f"stage={STAGE_OF.get(stage, stage)}", f"init_from={start(folder)}", f"data={data}",
        "data.train=pairs.jsonl", "data.val=pairs.jsonl", "data.batch_size=8", "max_epochs=9", f"max_steps={UPDATES.get(stage, 4)}",
        "optimizer.lr=1e-3", f"name={stage}-{name}", *STAGES[stage], *more,
    )  # fmt: skip
    return next((folder / "outputs" / STAGE_OF.get(stage, stage) / f"{stage}-{name}").iterdir())


def series(run: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[str], Path]:
    """Return what runs a stage on one device, once."""
    return cache(lambda stage: run(folder, stage, "one"))


@pytest.mark.parametrize(
    ("stage", "strategy"),
    [
        pytest.param(stage, strategy, marks=[] if (stage, strategy) in PER_COMMIT else pytest.mark.nightly)
        for stage, strategy in product(STAGES, STRATEGIES)
        # GRPO is tried with LoRA, which tensor parallelism refuses: the next test
        if (stage, strategy) != ("grpo", "tensor_parallel")
    ],
)
def test_two_ranks_learn_what_one_learns(stage: str, strategy: str, folder: Path, alone: Callable[[str], Path]) -> None:
    more = ["strategy.gather_sampling=true"] if (stage, strategy) == ("rloo", "fsdp2") else []
    one, two = alone(stage), run(folder, stage, strategy, f"strategy={strategy}", "trainer.devices=2", *more)
    tags = ["policy/loss", "reward/proxy", "kl/reference"] if stage in ONLINE else ["train/loss", "val/loss"]
    for tag in [*tags, "optim/grad_norm"]:
        assert series(two, tag) == pytest.approx(series(one, tag), rel=1e-4, abs=1e-5), tag
    first, second = (load_file(r / "model" / "model.safetensors") for r in (one, two))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        # two ranks add the same gradients in another order; four Adam steps of 1e-3 carry the rounding into the weights
        torch.testing.assert_close(second[name], weight, rtol=1e-5, atol=2e-5, msg=name)
    assert len(list(two.glob("*.log"))) == 2  # one a rank
    metrics = [json.loads((r / "metrics.json").read_text()) for r in (one, two)]
    assert metrics[1]["global_step"] == metrics[0]["global_step"] == UPDATES.get(stage, 4)


@pytest.mark.nightly
@pytest.mark.parametrize("strategy", ["fsdp2", "tensor_parallel"])
def test_a_sharded_critic_is_refitted(strategy: str, folder: Path, alone: Callable[[str], Path]) -> None:
    given = [f"reward_from={alone('reward') / 'model'}", "ppo.critic_refit=4", "ppo.value_clip=null"]
    one = run(folder, "ppo", f"critic-of-{strategy}", *given)
    two = run(folder, "ppo", f"critic-{strategy}", *given, f"strategy={strategy}", "trainer.devices=2")
    for tag in ("value/explained_variance", "value/loss", "optim/critic_grad_norm"):
        assert series(two, tag) == pytest.approx(series(one, tag), rel=1e-3, abs=1e-4), tag
    assert series(one, "value/loss")[1] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["strategy=tensor_parallel", "adapter=lora"], "adapter=lora .* strategy=fsdp2"),
        (["strategy=tensor_parallel", "strategy.tensor_parallel_size=3"], "does not divide 2 devices"),
        (
            ["strategy=tensor_parallel", "model.build.heads=1", "init_from=null", *SMALL[:2]],
            "cannot be split over 2 devices",
        ),
    ],
)
def test_what_cannot_work_says_why(folder: Path, more: list[str], message: str) -> None:
    given = [f"init_from={start(folder)}", "data=demonstrations/jsonl", "data.train=pairs.jsonl", "trainer.devices=2"]
    done = rlhf(folder, "stage=sft", "name=cannot", *given, *more, code=None)
    assert re.search(message, done.stderr), done.stderr[-2000:]


FLAT = ["schedule=constant", "schedule.warmup=0", "callbacks.checkpoint.every_n_steps=1"]


@pytest.fixture(scope="module")
def on_two(folder: Path) -> Callable[[str, int], Path]:
    """Return what runs SFT for a number of steps on two devices under a strategy, once."""

    def make(strategy: str, steps: int) -> Path:
        two = [f"strategy={strategy}", "trainer.devices=2", *FLAT]
        return run(folder, "sft", f"{strategy}-{steps}", *two, f"max_steps={steps}")

    return cache(make)


@pytest.mark.nightly
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_resume_on_as_many_ranks_is_exact_and_on_others_is_not(
    strategy: str, folder: Path, on_two: Callable[[str, int], Path]
) -> None:
    two = [f"strategy={strategy}", "trainer.devices=2", *FLAT]
    whole, half = on_two(strategy, 4), on_two(strategy, 2)
    again = run(folder, "sft", f"again-{strategy}", *two, f"resume={half}")
    expected, found = (load_file(r / "model" / "model.safetensors") for r in (whole, again))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    one = run(folder, "sft", f"one-{strategy}", *FLAT, f"resume={half}")
    alone = run(folder, "sft", f"alone-{strategy}", *FLAT, "max_steps=2")
    back = run(folder, "sft", f"back-{strategy}", *two, f"resume={alone}")
    for other in (one, back):
        for name, weight in load_file(other / "model" / "model.safetensors").items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=2e-5, msg=name)
    (shards,) = (half / "checkpoints").glob("last.ckpt.*.shards") if strategy == "fsdp2" else [None]
    assert shards is None or len(list(shards.glob("*.safetensors"))) == 2  # one a rank
    assert "not bit-exact" in (one / "run.log").read_text()
    assert "not bit-exact" not in (again / "run.log").read_text()


@pytest.mark.nightly
def test_the_dropout_of_every_rank_continues(folder: Path) -> None:
    """Ranks draw different numbers of masks, for their rows differ in length; each goes on from its own state."""
    two = [*TWO, "adapter=lora", "adapter.dropout=0.3", "callbacks.checkpoint.every_n_steps=1", "schedule=constant"]
    whole = run(folder, "sft", "dropout", *two)
    half = run(folder, "sft", "dropout-half", *two, "max_steps=2")
    again = run(folder, "sft", "dropout-again", *two, f"resume={half}")
    expected, found = (load_file(r / "model" / "model.safetensors") for r in (whole, again))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_rank_that_fails_ends_the_run(folder: Path) -> None:
    (folder / "rewards2.py").write_text(BROKEN)
    arguments = ["stage=ppo", f"init_from={start(folder)}", "data.train=pairs.jsonl", "name=broken"]
    done = rlhf(folder, *arguments, "reward_from=rewards2:broken", *TWO, code=None)
    assert time.time() - float((folder / "broke").read_text()) < 30
    assert "rank 1 broke" in done.stderr
    assert "Traceback" not in done.stderr
    assert not os.path.exists(folder / "outputs" / "ppo" / "broken" / "model")


@pytest.mark.nightly
def test_layers_split_over_two_devices_and_sharded_over_two(folder: Path, alone: Callable[[str], Path]) -> None:
    four = ["strategy=tensor_parallel", "strategy.tensor_parallel_size=2", "trainer.devices=4"]
    one, two = alone("ppo"), run(folder, "ppo", "four", *four)
    for tag in ("policy/loss", "reward/proxy", "kl/reference", "optim/grad_norm"):
        assert series(two, tag) == pytest.approx(series(one, tag), rel=1e-4, abs=1e-5), tag
    first, second = (load_file(r / "model" / "model.safetensors") for r in (one, two))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-5, atol=2e-5, msg=name)


@pytest.mark.nightly
def test_a_run_goes_on_under_another_strategy(folder: Path, on_two: Callable[[str, int], Path]) -> None:
    expected = load_file(on_two("fsdp2", 4) / "model" / "model.safetensors")  # as one device has it: the tests above
    two, half = [*FLAT, "trainer.devices=2"], on_two("fsdp2", 2)
    split = run(folder, "sft", "split", *two, "strategy=tensor_parallel", f"resume={half}", "max_steps=3")
    again = run(folder, "sft", "joined", *two, "strategy=fsdp2", f"resume={split}")
    for name, weight in load_file(again / "model" / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.nightly)])
def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(strategy: str, folder: Path) -> None:
    long = [
        "data=preferences/jsonl",
        "data.train=pairs.jsonl",
        "data.batch_size=8",
        "max_epochs=-1",
        "max_steps=100000",
    ]
    command = [
        "stage=sft",
        f"init_from={start(folder)}",
        f"name=signal-{strategy}",
        *long,
        f"strategy={strategy}",
        "trainer.devices=2",
    ]
    child = subprocess.Popen(
        [sys.executable, "-m", "rlhf_lightning", *command],
        cwd=folder,
        env=environment(folder),
        stderr=subprocess.PIPE,
        text=True,
    )
    place = folder / "outputs" / "sft" / f"signal-{strategy}"
    deadline = time.monotonic() + 240
    while not list(place.glob("*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.5)
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 143, errors[-2000:]
    assert "add resume=auto" in errors
    (checkpoint,) = place.glob("*/checkpoints/last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] > 0
