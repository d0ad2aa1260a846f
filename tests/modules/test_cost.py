"""What a step computes, counted without a clock: forward passes, tokens that are read, rows of logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from transformers.models.llama.modeling_llama import LlamaModel

from rlhf_lightning import DPO, SFT, DemonstrationData, PreferenceData, RewardModel
from rlhf_lightning.models.completion import CompletionModel
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer
from rlhf_lightning.modules.rollout import Rollout
from tests.helpers.lightning import quiet_lightning
from tests.modules import bandit
from tests.modules.offline import WORDS, fit, sgd, start

Work = dict[str, list[int]]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """The tokens each decoder pass reads, and the rows each output head computes."""
    seen: Work = {"read": [], "logits": []}
    forward, head = LlamaModel.forward, CompletionModel.head

    def reading(self: Any, input_ids: Any = None, **given: Any) -> Any:
        seen["read"].append(input_ids.numel())
        return forward(self, input_ids=input_ids, **given)

    def speaking(self: Any, hidden: Any) -> Any:
        seen["logits"].append(hidden.shape[0])
        return head(self, hidden)

    monkeypatch.setattr(LlamaModel, "forward", reading)
    monkeypatch.setattr(CompletionModel, "head", speaking)
    return seen


class PerStep(Callback):
    """Keeps the work of every training step with the batch it was for."""

    def __init__(self, work: Work) -> None:
        self.work, self.steps = work, []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.work["read"], self.work["logits"] = [], []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.steps.append((batch, self.work["read"], self.work["logits"]))


def long_rows() -> Iterator[dict[str, str]]:
    """Yield pairs long enough to be read as one row, of lengths that would leave padding in several."""
    for number, size in enumerate((40, 90, 60, 150)):
        words = [WORDS[(number * i) % 16] for i in range(size)]
        yield {"prompt": " ".join(words), "chosen": " ".join(words[::-1]), "rejected": " ".join(words[: size // 2])}


OFFLINE: dict[str, tuple[Any, dict[str, Any], int, bool]] = {
    # module, its options, decoder passes a step, whether it has logits
    "sft": (SFT, {}, 1, True),
    "reward": (RewardModel, {}, 1, False),
    "dpo": (DPO, {"reference": "live"}, 2, True),
    "dpo with LoRA": (DPO, {"lora": {"r": 2, "target_modules": "all-linear"}}, 2, True),
    "dpo, cached reference": (DPO, {"reference": "cached"}, 1, True),
    "simpo": (DPO, {"loss": "simpo"}, 1, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", OFFLINE)
@quiet_lightning
def test_every_pass_reads_each_token_once_and_no_padding(tmp_path: Path, work: Work, stage: str) -> None:
    kind, options, passes, speaks = OFFLINE[stage]
    folder = start(tmp_path)
    read = DemonstrationData if kind is SFT else PreferenceData
    rows = list(long_rows())
    if kind is SFT:
        rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]
    data = read(load_tokenizer(folder), rows, batch_size=3, row_tokens=300, cache_dir=tmp_path)
    module = kind(partial(load_scalar_model if kind is RewardModel else load_causal_lm, folder), sgd(1e-3), **options)
    watching = PerStep(work)
    fit(module, data, 2, callbacks=[watching])
    assert len(watching.steps) == 2
    for batch, tokens, logits in watching.steps:
        groups = [data.rows["train"][row] for row in batch.index.tolist()]
        assert tokens == [sum(group.tokens for group in groups)] * passes
        assert sum(tokens) < passes * batch.input_ids.numel() or batch.input_ids.shape[0] == 1
        assert logits == [sum(group.loss_tokens for group in groups)] * (passes if speaks else 0)
    assert any(batch.input_ids.shape[0] > 1 for batch, _, _ in watching.steps)  # else nothing was saved


ONLINE: dict[str, tuple[dict[str, Any], int]] = {
    # options, decoder passes over a rollout with two inner epochs
    "ppo, value head": ({"estimator": "gae"}, 2 + 2),
    "ppo, critic": ({"estimator": "gae", "load_critic": bandit.load_critic}, 3 + 2 * 2),
    "rloo": ({"estimator": "rloo", "num_generations": 4}, 2 + 2),
    "grpo": ({"estimator": "grpo", "num_generations": 4}, 2 + 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONLINE)
@quiet_lightning
def test_a_rollout_is_read_once_for_its_values_and_once_an_epoch(
    work: Work, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Policy and value share a pass, the samples of a prompt share it; sampling reads prompts once and then tokens."""
    options, passes = ONLINE[kind]
    kept: list[tuple[Rollout, int]] = []
    module = bandit.build(max_new_tokens=6, ppo_epochs=2, **options)
    rollout = module.rollout

    def sampling(batch: Any, split: str = "train") -> Rollout:
        before = len(work["read"])
        found = rollout(batch, split)
        kept.append((found, len(work["read"]) - before))
        return found

    monkeypatch.setattr(module, "rollout", sampling)
    watching = PerStep(work)
    bandit.fit(module, bandit.Prompts(2), callbacks=[watching])
    assert len(watching.steps) == 2
    for (_, tokens, logits), (found, sampled) in zip(watching.steps, kept, strict=True):
        responses = [len(response) for group in found.groups for response in group.responses]
        drawn = tokens[:sampled][-max(responses) :]  # before them, the first time, stands a trial of the model's cache
        assert drawn[0] == sum(len(group.prompt) for group in found.groups)
        assert drawn[1:] == [sum(length > t for length in responses) for t in range(1, max(responses))]
        total = sum(group.tokens for group in found.groups)
        assert total * passes <= sum(tokens[sampled:]) <= 1.1 * total * passes
        assert sum(logits) == sum(responses) * 4
