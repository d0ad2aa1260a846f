"""What comes before learning: shaped scores, the reference, samples, validation, and the state of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Engine, Generations
from rlhf_lightning.modules.ppo import PPO
from rlhf_lightning.modules.rollout import Rollout
from rlhf_lightning.ops.statistics import RunningMoments
from rlhf_lightning.rewards.scoring import load_reward
from tests.helpers.lightning import quiet_lightning
from tests.modules.bandit import (
    Prompts,
    attached,
    build,
    fit,
    load,
    two_responses,
    weights,
)


@quiet_lightning
def test_scores_are_scaled_then_clipped_then_penalized() -> None:
    module = attached(missing_eos_penalty=0.25, reward_clip=1.0, reward_scale=True)
    rollout = two_responses(module)
    shaped = module.shaped_scores(rollout)  # deviation of (1, -2) is 1.5
    assert shaped.tolist() == pytest.approx([1 / 1.5, -1.0 - 0.25])
    assert module.reward_moments == RunningMoments(2.0, -0.5, 4.5)
    module.shaped_scores(rollout)
    assert module.reward_moments == RunningMoments(4.0, -0.5, 9.0)


@quiet_lightning
def test_unfinished_responses_have_a_fixed_score() -> None:
    """Neither the reward's opinion of a cut text nor the penalty enters, not even through the scale."""
    module = attached(missing_eos_penalty=5.0, missing_eos_score=-1.0, reward_scale=True, reward_clip=0.5)
    rollout = two_responses(module, finished=(True, False))
    rollout.scores = torch.tensor([3.0, 1e6])
    assert module.shaped_scores(rollout).tolist() == [0.5, -1.0]  # the only score has no deviation, and is clipped
    rollout.finished = torch.tensor([True, True])
    rollout.scores = torch.tensor([5.0, 7.0])
    module.shaped_scores(rollout)
    assert module.reward_moments == RunningMoments(3.0, 5.0, 8.0)


@quiet_lightning
def test_the_scale_of_large_scores_keeps_its_digits() -> None:
    """Scores of 1e7 +- 0.5: float32 has no number for their mean."""
    module = attached(missing_eos_penalty=0.0, reward_scale=True)
    rollout = two_responses(module)
    rollout.scores = torch.tensor([1e7, 1e7 + 1])
    for _ in range(3):
        module.shaped_scores(rollout)
    assert module.reward_moments.std == pytest.approx(0.5, rel=1e-12)


@quiet_lightning
def test_equal_scores_are_not_scaled() -> None:
    module = attached(missing_eos_penalty=0.0, reward_scale=True)
    rollout = two_responses(module)
    rollout.scores = torch.tensor([2.0, 2.0])
    assert module.shaped_scores(rollout).tolist() == [2.0, 2.0]


@quiet_lightning
def test_another_engine_may_answer() -> None:
    """It sees the policy of the moment, and its responses are what is scored and learned."""
    asked: list[tuple[Any, ...]] = []

    class Server(Engine):
        def start(self, lm: Any, eos_ids: Any) -> None:
            self.lm, self.eos = lm, set(eos_ids)

        def generate(
            self, prompts: Any, n: int, *, max_new_tokens: int, temperature: float, **parts: Any
        ) -> Generations:
            weight = next(self.lm.parameters()).detach().sum().item()
            asked.append((self.eos, max_new_tokens, temperature, weight, n, parts["seed_parts"], parts["ids"]))
            return Generations([[7] * (1 + k) + [2] for _ in prompts for k in range(n)], [True] * (len(prompts) * n))

        def close(self) -> None:
            closed.append(True)

    closed: list[bool] = []
    module = build(
        engine=Server(), estimator="rloo", num_generations=2, temperature=0.5, reward=lambda p, r, m: [*map(len, r)]
    )
    rows = fit(module, Prompts(2, size=3)).rows
    assert [call[:3] for call in asked] == [({2}, 4, 0.5)] * 2
    assert [call[4:] for call in asked] == [(2, (0, "train", iteration), [0, 1, 2]) for iteration in (0, 1)]
    assert asked[0][3] != asked[1][3]
    assert closed == [True]
    assert rows[0]["reward/proxy"] == 4.0  # "7 2" and "7 7 2"


@pytest.mark.slow
@quiet_lightning
def test_reference_is_the_start_and_outside_of_the_state() -> None:
    module = build()
    fit(module, Prompts(3))
    start = load().state_dict()
    assert module.reference is not None
    for name, tensor in module.reference.model.lm.state_dict().items():
        assert torch.equal(tensor, start[name]), name
    assert not [name for name in module.state_dict() if "reference" in name]
    assert not torch.equal(module.policy.lm.state_dict()["model.norm.weight"], start["model.norm.weight"])


@pytest.mark.slow
@quiet_lightning
def test_adapter_off_is_the_reference() -> None:
    module = build(lora={"r": 4, "alpha": 8}, lr=5e-2)
    rows = fit(module, Prompts(4)).rows
    assert module.reference is None
    assert rows[0]["kl/reference"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["kl/reference"] > 1e-3
    start = load().state_dict()
    for name, tensor in module.policy.lm.state_dict().items():  # type: ignore[union-attr]
        if "lora" not in name:
            assert torch.equal(tensor, start[name.replace("base_model.model.", "").replace(".base_layer", "")]), name
    assert type(module.export_model()) is LlamaForCausalLM


@pytest.mark.slow
@quiet_lightning
def test_checkpoint_carries_what_is_not_a_weight(tmp_path: Path) -> None:
    module = build(kl_target=1e-4, kl_horizon=32, reward_scale=True)
    fit(module, Prompts(3))
    held: dict[str, Any] = {}
    module.on_save_checkpoint(held)
    torch.save(held, tmp_path / "extra.ckpt")
    fresh = build(kl_target=1e-4)
    fresh.on_load_checkpoint(torch.load(tmp_path / "extra.ckpt", weights_only=True))
    assert (fresh.iteration, fresh.episodes) == (3, 48)
    assert fresh.kl.beta == module.kl.beta != 0.05
    assert fresh.reward_moments == module.reward_moments


@pytest.mark.slow
@quiet_lightning
def test_the_seed_decides_everything() -> None:
    one, same, other = build(seed=1), build(seed=1), build(seed=2)
    for number, module in enumerate((one, same, other)):
        torch.manual_seed(number)
        fit(module, Prompts(2))
    assert all(torch.equal(tensor, weights(same)[name]) for name, tensor in weights(one).items())
    assert one.samples_seen == same.samples_seen
    assert one.samples_seen != other.samples_seen


@quiet_lightning
def test_samples_and_gold_are_kept() -> None:
    seen: list[dict[str, Any]] = []
    asked: list[str] = []

    def gold(prompts: Any, responses: Any, metadata: Any) -> list[float]:
        seen.extend(metadata)
        asked.extend(prompts)
        return [float(len(text.split())) for text in responses]

    module = build(gold=gold, num_generations=2)
    row = fit(module, Prompts(1, size=3)).rows[0]
    assert len(module.samples_seen) == 6
    assert set(module.samples_seen[0]) == {"prompt", "response", "reward", "finished", "gold"}
    assert row["reward/gold"] == pytest.approx(sum(s["gold"] for s in module.samples_seen) / 6)
    assert [m["row"] for m in seen] == [0, 0, 1, 1, 2, 2]
    assert asked == [str(prompt) for prompt in ([1, 3, 5], [1, 4, 6], [1, 5, 7]) for _ in range(2)]
    assert {m["finished"] for m in seen} <= {True, False}


@pytest.mark.slow
@quiet_lightning
def test_validation_reports_means_over_the_held_out_prompts() -> None:
    module = build()
    found = fit(module, Prompts(2, val=True)).validation
    assert set(found) == {"val/reward", "val/kl", "val/length", "val/ended_with_eos"}
    assert found["val/reward"] == pytest.approx(sum(s["reward"] for s in module.samples_seen) / 16)
    assert 1 <= found["val/length"] <= 4
    assert module.iteration == 2  # validation is no iteration


@quiet_lightning
def test_bad_reward_stops_with_the_response() -> None:
    with pytest.raises(UserError, match="the reward is nan for the response"):
        fit(build(reward=lambda prompts, responses, metadata: [math.nan] * len(prompts)), Prompts(1))


def sampled(**options: Any) -> tuple[PPO, Rollout]:
    """Return a module and its first rollout, with log-probabilities, outside of a training loop."""
    module, data = attached(**options), Prompts(1)
    module.trainer.datamodule = data
    module.configure_model()
    rollout = module.rollout(data.batches[0])
    module.logprobs(rollout)
    return module, rollout


@quiet_lightning
def test_log_probs_have_the_temperature_of_generation() -> None:
    """Near temperature 0 every sampled token is certain; another temperature in one of the two would say otherwise."""
    _, rollout = sampled(temperature=1e-4)
    assert rollout.tokens["old_logprobs"][rollout.mask].exp().mean().item() > 0.99


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}])
@quiet_lightning
def test_the_reference_has_the_temperature_of_the_policy(lora: Any) -> None:
    _, rollout = sampled(temperature=0.3, lora=lora)
    torch.testing.assert_close(rollout.tokens["ref_logprobs"], rollout.tokens["old_logprobs"], rtol=0, atol=1e-4)


@pytest.mark.slow
@quiet_lightning
def test_every_iteration_draws_anew() -> None:
    drawn: list[list[str]] = []
    module = build(
        lr=0.0, reward=lambda prompts, responses, metadata: drawn.append(responses) or [0.0] * len(responses)
    )
    fit(module, Prompts(2))
    assert drawn[0] != drawn[1]  # the same prompts and weights


@quiet_lightning
def test_a_reward_with_groups_shows_the_score_of_each() -> None:
    def low(prompts: Any, responses: Any, metadata: Any) -> list[float]:
        return [-float(sum(map(ord, text)) % 7) for text in responses]

    def high(prompts: Any, responses: Any, metadata: Any) -> list[float]:
        return [-2 * value - 9 for value in low(prompts, responses, metadata)]

    reward = load_reward({"under": low, "over": high}, how="worst")
    module = build(reward=reward, gold=load_reward({"under": low, "over": high}), num_generations=2)
    metrics = fit(module, Prompts(1, size=8)).rows[0]
    lower = {sample["reward_under"] < sample["reward_over"] for sample in module.samples_seen}
    assert lower == {True, False}
    for sample in module.samples_seen:
        assert sample["reward"] == min(sample["reward_under"], sample["reward_over"])
        assert sample["gold"] == (sample["reward_under"] + sample["reward_over"]) / 2
    for name, column in (("proxy_under", "reward_under"), ("gold_over", "gold_over"), ("proxy", "reward")):
        values = [sample[column] for sample in module.samples_seen]
        assert metrics[f"reward/{name}"] == pytest.approx(sum(values) / len(values)), name
