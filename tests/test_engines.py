"""`sampler=vllm` and `sampler=continuous` from the command; the server is a test double of vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.runtime.settings import identity, to_container
from tests.helpers.cli import newest, rlhf
from tests.helpers.compose import composed
from tests.helpers.openai_server import FakeServer
from tests.helpers.vllm_double import Double, vllm_double

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("engines")]
REWARD = "def length(prompts, responses, metadata):\n    return [float(len(r) % 5) for r in responses]\n"
ONLINE = [
    "stage=rloo", "init_from=model", "data.train=prompts.jsonl", "data.batch_size=4", "max_steps=2",
    "reward_from=rewards:length", "rloo.num_generations=2", "rloo.max_new_tokens=6", "rloo.missing_eos_penalty=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts and a reward."""
    place = tmp_path_factory.mktemp("engines")
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(8)))
    (place / "rewards.py").write_text(REWARD)
    build_tiny(
        place / "model", [f"Say {i}. It is {i}." for i in range(9)], vocab_size=280, hidden_size=32, layers=2, heads=2
    )
    return place


@pytest.fixture
def server(folder: Path) -> Iterator[tuple[Double, FakeServer]]:
    with vllm_double(LlamaForCausalLM.from_pretrained(folder / "model")) as served:
        yield served


def metrics(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((newest(folder, stage) / "metrics.json").read_text())


def test_training_and_evaluation_with_a_server(folder: Path, server: tuple[Double, FakeServer]) -> None:
    sampler = ["sampler=vllm", f"sampler.base_url={server[1].url}"]
    rlhf(folder, *ONLINE, *sampler, "adapter=lora", "sampler.weights=lora", "optimizer.lr=1e-2", "name=served")
    run = newest(folder, "rloo")
    assert metrics(folder, "rloo")["rollout/logprob_difference"] < 1e-4
    assert server[0].adapters == {}
    rlhf(
        folder, "stage=candidates", f"init_from={run / 'model'}", "data.train=prompts.jsonl", "candidates.num_generations=3",
        "candidates.max_new_tokens=6", *sampler,
    )  # fmt: skip
    rows = [json.loads(line) for line in (newest(folder, "candidates") / "candidates.jsonl").read_text().splitlines()]
    assert [len(row["responses"]) for row in rows] == [3] * 8
    assert list((folder / "cache" / "vllm").iterdir()) == []


def test_training_with_continuous_batching(folder: Path) -> None:
    rlhf(folder, *ONLINE, "sampler=continuous", "sampler.batch_tokens=2048", "name=continuous")
    assert metrics(folder, "rloo")["rollout/logprob_difference"] < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sampler=vllm"], "sampler.base_url=<URL up to /v1> is needed: sampler=vllm asks a server"),
        (
            ["sampler=vllm", "sampler.base_url=http://127.0.0.1:9/v1", "sampler.retries=0"],
            "127.0.0.1:9/v1 cannot be used",
        ),
        (["sampler=vllm", "sampler.base_url=localhost"], "sampler.base_url=localhost is not a URL"),
        (["sampler=vlm"], "vllm"),
    ],
)
def test_mistakes_are_one_line(folder: Path, arguments: list[str], message: str) -> None:
    done = rlhf(folder, *ONLINE, *arguments, "name=wrong", code=2)
    assert message in done.stderr


def test_another_timeout_is_the_same_run() -> None:
    """What failed for a slow server is resumed with `resume=auto` and a longer time-out."""
    given = composed("stage=ppo", "sampler=vllm", "sampler.base_url=http://127.0.0.1:8000/v1")
    patient = composed("stage=ppo", "sampler=vllm", "sampler.base_url=http://127.0.0.1:9000/v1", "sampler.timeout=900")
    other = composed("stage=ppo", "sampler=vllm", "sampler.base_url=http://127.0.0.1:8000/v1", "sampler.weights=lora")
    one, two, three = (identity(to_container(cfg))["sampler"] for cfg in (given, patient, other))
    assert one == two != three


@pytest.mark.nightly
@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["fsdp2", "tensor_parallel"])
def test_a_sharded_model_is_sent_whole(strategy: str, folder: Path, server: tuple[Double, FakeServer]) -> None:
    sampler = ["sampler=vllm", f"sampler.base_url={server[1].url}"]
    rlhf(folder, *ONLINE, *sampler, f"strategy={strategy}", "trainer.devices=2", "name=sharded")
    assert metrics(folder, "rloo")["rollout/logprob_difference"] < 1e-4
    assert sum(path == "/collective_rpc" for path, _, _ in server[1].seen) == 2
