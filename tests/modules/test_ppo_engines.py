"""PPO with engines elsewhere: a test double of a vLLM server, and continuous batching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.continuous import ContinuousEngine
from rlhf_lightning.generation.engine import Generations
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.generation.vllm import VLLMEngine
from rlhf_lightning.modules.invariants import engine_difference
from tests.helpers.lightning import quiet_lightning
from tests.helpers.openai_server import Sent
from tests.helpers.vllm_double import vllm_double
from tests.modules import bandit

pytestmark = pytest.mark.slow
LORA = {"r": 2, "dropout": 0.0}


@pytest.mark.parametrize("weights", ["folder", "lora"])
@quiet_lightning
def test_a_server_has_the_policy_of_every_iteration(weights: str, tmp_path: Path) -> None:
    """The log-probabilities that it sampled with are the policy's: no ratio starts away from 1."""
    with vllm_double(bandit.load()) as (double, server):
        engine = VLLMEngine(server.url, weights=weights, folder=tmp_path, sleep=True)
        module = bandit.build(engine=engine, lora=LORA if weights == "lora" else None, temperature=0.7)
        rows = bandit.fit(module, bandit.Prompts(2, size=4)).rows
        assert len(rows) == 2
        for row in rows:
            assert 0 <= row["rollout/logprob_difference"] <= row["rollout/logprob_difference_max"] < 1e-4
        sent = [path for path, _, _ in server.seen]
        assert sent.count("/v1/load_lora_adapter" if weights == "lora" else "/collective_rpc") == 2
        assert sent.count("/sleep?level=1") == 2
        asked = [body for path, _, body in server.seen if path == "/v1/completions" and body["stop_token_ids"]]
        assert len({body["seed"] for body in asked}) == len(asked) == 8
        assert double.adapters == {}
    assert list(tmp_path.iterdir()) == []


@quiet_lightning
def test_a_server_that_keeps_old_weights_ends_the_run(tmp_path: Path) -> None:
    with vllm_double(bandit.load()) as (double, server):
        module = bandit.build(engine=VLLMEngine(server.url, folder=tmp_path), lr=0.3)

        def change(path: str, body: Any, answer: Any) -> Any:
            double.stale = True
            return answer

        double.change = change
        with pytest.raises(UserError, match="has other weights than the model: its log-probabilities of a probe"):
            bandit.fit(module, bandit.Prompts(3, size=4))
        assert module.iteration == 1


@quiet_lightning
def test_a_server_that_dies_ends_the_run_between_two_updates(tmp_path: Path) -> None:
    """What was learned is whole: a checkpoint of it may be resumed from."""
    with vllm_double(bandit.load()) as (double, server):
        module = bandit.build(engine=VLLMEngine(server.url, folder=tmp_path, retries=0))

        def change(path: str, body: Any, answer: Any) -> Any:
            return Sent(b"", 503) if module.iteration == 2 else answer

        double.change = change
        with pytest.raises(UserError, match="answered 503 Service Unavailable"):
            bandit.fit(module, bandit.Prompts(3, size=4))
    assert module.iteration == 2
    assert all(torch.isfinite(tensor).all() for tensor in bandit.weights(module).values())


@quiet_lightning
def test_continuous_batching_learns(tmp_path: Path) -> None:
    module = bandit.build(
        engine=ContinuousEngine(batch_tokens=4096), estimator="rloo", num_generations=2, temperature=0.7
    )
    rows = bandit.fit(module, bandit.Prompts(2, size=4, val=True)).rows
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["rollout/logprob_difference"] < 1e-4
    assert module.policy.lm.config._attn_implementation == "sdpa"


@quiet_lightning
def test_the_difference_is_over_tokens() -> None:
    class Off(LocalEngine):
        """One response of three tokens with log-probabilities off by 1, one of one token off by 5."""

        def generate(self, *args: Any, **options: Any) -> Generations:
            return Generations([[4, 5, 2], [2]], [True, True], [[0.0] * 3, [0.0]])

    module = bandit.attached(engine=Off(), template=bandit.Ids())
    module.configure_model()
    rollout = module.rollout(bandit.Prompts(1, size=2).batches[0])
    rollout.tokens["old_logprobs"] = torch.tensor([[-1.0, 1.0, -1.0], [-5.0, 7.0, 7.0]])
    found = engine_difference(rollout, module.reduce)
    assert found == {"rollout/logprob_difference": 2.0, "rollout/logprob_difference_max": 5.0}


def test_engines_that_cut_the_distribution_are_refused() -> None:
    for engine in (ContinuousEngine(top_p=0.9), VLLMEngine("http://127.0.0.1:9/v1", top_p=0.9)):
        with pytest.raises(UserError, match=r"^sampler\.top_p=0\.9: "):
            bandit.build(engine=engine)


@quiet_lightning
def test_an_engine_of_another_kind_is_refused() -> None:
    class Old:
        def start(self, *_: Any) -> None: ...

        def generate(self, *_: Any, **__: Any) -> Any: ...

        def close(self) -> None: ...

    message = r"^sampler: Old is no rlhf_lightning\.Engine: derive it from that class"
    with pytest.raises(UserError, match=message):
        bandit.fit(bandit.build(engine=Old()), bandit.Prompts(1))


@pytest.mark.dist
@quiet_lightning
def test_of_two_ranks_the_first_brings_the_weights(tmp_path: Path) -> None:
    with vllm_double(bandit.load()) as (double, server):
        module = bandit.build(engine=VLLMEngine(server.url, folder=tmp_path / "weights"))
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0,
            callbacks=[bandit.KeepWeights(tmp_path / "two.pt")],
        )  # fmt: skip
        trainer.fit(module, bandit.Split(2))
        asked = [body for path, _, body in server.seen if path == "/v1/completions" and body["stop_token_ids"]]
        assert len(asked) == 2 * 16
        assert sum(path == "/collective_rpc" for path, _, _ in server.seen) == 2
        assert len({body["seed"] for body in asked}) == 2 * 16  # each rank its own
        # the weights of the second iteration's rollout, and not yet those after it
        trained = torch.load(tmp_path / "two.pt")
        assert not torch.equal(double.lm.state_dict()["lm_head.weight"], trained["policy.lm.lm_head.weight"])
    assert list((tmp_path / "weights").iterdir()) == []
