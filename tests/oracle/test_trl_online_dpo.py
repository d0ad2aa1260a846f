"""Online DPO: choice, loss, gradient norm and ten optimizer steps equal those of TRL's experimental trainer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from rlhf_lightning import OnlineDPO, PromptData
from rlhf_lightning.generation.engine import Engine, Generations
from rlhf_lightning.models.loading import load_causal_lm
from tests.modules.offline import fit, sgd
from tests.oracle.replay import END, PROMPTS
from tests.oracle.side_by_side import (
    STEPS,
    Curve,
    arguments,
    assert_same,
    conversation,
    quiet_trl,
    start,
    tokenizer,
)

pytest.importorskip("trl", reason="TRL is absent: pip install 'rlhf-lightning[oracle]'")
pytestmark = pytest.mark.oracle


def respond(prompt: Sequence[int], iteration: int, longest: int, tokens: Sequence[int]) -> list[list[int]]:
    """Return two responses, of which about half end where they may be longer than a token."""
    draw = random.Random(repr((list(prompt), iteration)))
    found = [[first, *draw.choices(tokens, k=draw.randrange(longest))] for first in draw.sample(tokens, 2)]
    return [[*y, END] if longest > 1 and draw.random() < 0.5 else y for y in found]


def letters(folder: Path) -> list[int]:
    """Return tokens that are text: equal texts, such as broken bytes, are no preference here and one in TRL."""
    return [token for token in range(6, 300) if tokenizer(folder).decode([token]).isalpha()]


def score(response: Sequence[int]) -> float:
    """Return a score that no two responses here share: equal scores are a preference in TRL."""
    return sum(token * 1.37**place for place, token in enumerate(response)) / 100


class Recorded(OnlineDPO):
    """Keeps the loss and the gradient norm of every update."""

    curve: Curve

    def backward_part(self, loss: Any, last: bool) -> None:
        self.curve.losses.append(loss.item())
        super().backward_part(loss, last)

    def minibatch(self, *args: Any, **options: Any) -> float:
        self.curve.norms.append(super().minibatch(*args, **options))
        return self.curve.norms[-1]


def ours(folder: Path, longest: int, **options: Any) -> Recorded:
    """Train ten updates on made-up responses and return the module."""
    sampled: list[list[int]] = []
    tokens = letters(folder)

    class Replay(Engine):
        iteration = 0

        def start(self, *_: Any) -> None: ...

        def close(self) -> None: ...

        def generate(self, prompts: Sequence[Sequence[int]], n: int, **_: Any) -> Generations:
            sampled[:] = [y for prompt in prompts for y in respond(prompt, self.iteration, longest, tokens)]
            self.iteration += 1
            return Generations(list(sampled), [y[-1] == END for y in sampled])

    data = PromptData(tokenizer(folder), [{"prompt": p} for p in PROMPTS], batch_size=len(PROMPTS), cache_dir=folder)
    module = Recorded(
        partial(load_causal_lm, start(folder)), sgd(0.02), reward=lambda *_: [score(y) for y in sampled],
        engine=Replay(), max_grad_norm=0.0, **options,
    )  # fmt: skip
    module.curve = Curve([], [])
    fit(module, data, STEPS, limit_val_batches=0)
    return module


def theirs(folder: Path, longest: int, **options: Any) -> Curve:
    """Train TRL's trainer on the same responses; return the curve, whose losses its log rounds."""
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    curve, tokens = Curve([], []), letters(folder)

    class Replayed(OnlineDPOTrainer):
        iteration = 0

        def _generate(self, model: Any, prompts: Any, images: Any = None) -> Any:
            assert self.processing_class is not None
            texts = [
                self.processing_class.apply_chat_template(p, add_generation_prompt=True, tokenize=False)
                for p in prompts
            ]
            asked = [self.processing_class(text, add_special_tokens=False)["input_ids"] for text in texts]
            pairs = [respond(prompt, self.iteration, longest, tokens) for prompt in asked]
            self.iteration += 1
            prompt_ids, prompt_mask = padded(asked * 2, left=True)
            completion_ids, completion_mask = padded([pair[k] for k in range(2) for pair in pairs], left=False)
            return prompt_ids, prompt_mask, completion_ids, completion_mask, None

        def training_step(self, *args: Any, **more: Any) -> Any:
            loss = super().training_step(*args, **more)
            curve.losses.append(loss.item())
            return loss

    trainer = Replayed(
        model=load_causal_lm(start(folder)),
        reward_funcs=lambda completion_ids, **_: [score(without_padding(y)) for y in completion_ids],
        args=arguments(
            OnlineDPOConfig,
            folder,
            per_device_train_batch_size=len(PROMPTS),
            optim="sgd",
            learning_rate=0.02,
            weight_decay=0.0,
            **options,
        ),
        train_dataset=Dataset.from_list([conversation({"prompt": p}) for p in PROMPTS]),
        processing_class=tokenizer(folder),
    )
    trainer.train()
    curve.norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return curve


def padded(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask of rows filled up with 0."""
    longest = max(map(len, rows))
    fill = [[0] * (longest - len(row)) for row in rows]
    ids = [f + row if left else row + f for row, f in zip(rows, fill, strict=True)]
    mask = [
        [0] * len(f) + [1] * len(row) if left else [1] * len(row) + [0] * len(f)
        for row, f in zip(rows, fill, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def without_padding(ids: list[int]) -> list[int]:
    return [token for token in ids if token != 0]


@pytest.mark.parametrize(
    ("longest", "options"),
    [
        (5, {"beta": 0.3, "missing_eos_penalty": 2.0}),
        # of one token: there the sum of log-probabilities, which TRL takes, is our mean. The gradient of every other
        # token is 0 up to rounding, which Adam would divide by itself
        (1, {"beta": 0.4, "missing_eos_penalty": 1.0, "loss": "ipo"}),
    ],
    ids=["sigmoid", "ipo"],
)
@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@quiet_trl
def test_online_dpo(tmp_path: Path, longest: int, options: dict[str, Any]) -> None:
    module = ours(tmp_path, longest, **options)
    curve = theirs(tmp_path, longest, **{"loss_type" if k == "loss" else k: value for k, value in options.items()})
    assert_same(module.curve, curve)
    assert module.trainer.callback_metrics["online_dpo/ties"] == 0.0
