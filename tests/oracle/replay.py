"""The same made-up responses and scores for this package's PPO and for TRL's online trainers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from rlhf_lightning import PPO, PromptData
from rlhf_lightning.generation.engine import Engine, Generations
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.modules.rollout import Rollout
from tests.modules.offline import fit
from tests.oracle.side_by_side import STEPS, Curve, arguments, conversation, start, tokenizer

PROMPTS = ["say red blue", "name gold", "teal", "pink lime navy ruby"]
SAMPLES, LENGTHS = 3, ((3, 1, 4), (2, 5, 1), (4, 4, 2), (1, 3, 5))
END = 2


def respond(prompt: Sequence[int], iteration: int, lengths: Sequence[int]) -> list[list[int]]:
    """Return the responses to `prompt` in an iteration; about half of them end."""
    draw = random.Random(repr((list(prompt), iteration)))
    found = [[draw.randrange(6, 300) for _ in range(length)] for length in lengths]
    return [[*y[:-1], END] if draw.random() < 0.5 else y for y in found]


def score(response: Sequence[int]) -> float:
    return sum(response) % 11 / 5


class Script:
    """Hands out the responses of an iteration, and keeps the prompts it was asked for."""

    def __init__(self, lengths: Sequence[Sequence[int]] = LENGTHS) -> None:
        self.lengths = lengths
        self.iteration = 0
        self.prompts: list[list[list[int]]] = []

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the responses to every prompt, prompt by prompt."""
        ordered = sorted(list(prompt) for prompt in prompts)
        self.prompts.append(ordered)
        found = [y for p in prompts for y in respond(p, self.iteration, self.lengths[ordered.index(list(p))])]
        self.iteration += 1
        return found


class Recorded(PPO):
    """Keeps the loss and the gradient norm of every update, and the KL estimate a token of every rollout."""

    curve: Curve
    kls: list[float]

    def rewards(self, rollout: Rollout) -> dict[str, float]:
        metrics = super().rewards(rollout)
        self.kls.append(rollout.tokens["kl"].sum().item() / rollout.mask.sum().item())
        return metrics

    def backward_part(self, loss: Any, last: bool) -> None:
        assert last  # one microbatch an update
        self.curve.losses.append(loss.item())
        super().backward_part(loss, last)

    def minibatch(self, *args: Any, **kwargs: Any) -> Any:
        metrics, ratios = super().minibatch(*args, **kwargs)
        self.curve.norms.append(metrics["optim/grad_norm"])
        return metrics, ratios


def our_run(folder: Path, script: Script, optimizer: Any, **options: Any) -> Recorded:
    """Train ten updates on the script's responses and return the module."""
    drawn: list[list[int]] = []

    class Replay(Engine):
        def start(self, *_: Any) -> None: ...

        def close(self) -> None: ...

        def generate(self, prompts: Sequence[Sequence[int]], n: int, **_: Any) -> Generations:
            assert n == SAMPLES
            drawn[:] = script(prompts)
            return Generations(list(drawn), [y[-1] == END for y in drawn])

    data = PromptData(tokenizer(folder), [{"prompt": p} for p in PROMPTS], batch_size=len(PROMPTS), cache_dir=folder)
    settings: dict[str, Any] = {
        "reward": lambda *_: [score(y) for y in drawn], "num_generations": SAMPLES, "missing_eos_penalty": 0.0,
        "whiten_advantages": False, "max_grad_norm": 1e9, "engine": Replay(),
    }  # fmt: skip
    module = Recorded(partial(load_causal_lm, start(folder)), optimizer, **(settings | options))
    module.curve, module.kls = Curve([], []), []
    fit(module, data, STEPS, limit_val_batches=0)
    return module


def their_trainer(folder: Path, script: Script, kind: Any, settings: Any, **options: Any) -> Any:
    """Return an RLOO or GRPO trainer whose responses are the script's."""

    def generate(prompts: list[list[int]], *rest: Any) -> Any:
        found = script(prompts[::SAMPLES])
        return (found, None) if len(rest) == 3 else found  # GRPO also asks for log-probabilities of vLLM

    trainer = kind(
        load_causal_lm(start(folder)),
        reward_funcs=lambda completion_ids, **_: [score(y) for y in completion_ids],
        args=arguments(
            settings, folder, num_generations=SAMPLES, per_device_train_batch_size=SAMPLES * len(PROMPTS), **options
        ),
        train_dataset=Dataset.from_list([conversation({"prompt": p}) for p in PROMPTS]),
        processing_class=tokenizer(folder),
    )
    trainer._generate_single_turn = generate
    return trainer
