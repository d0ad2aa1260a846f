"""The built-in world at a size one CPU thread learns in seconds: every stage as the configs run it, only smaller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from rlhf_lightning import DPO, PPO, SFT, DemonstrationData, LocalEngine, PreferenceData, PromptData, RewardModel
from rlhf_lightning.generation.answers import answer
from rlhf_lightning.models.folder import write_model
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.modules.schedules import schedule
from rlhf_lightning.ops.statistics import mean_interval
from rlhf_lightning.rewards.scoring import Reward
from rlhf_lightning.world import gold, rows

BATCH, HELD_OUT, NEW_TOKENS = 64, 400, 40
SFT_STEPS, DPO_STEPS, PPO_ITERATIONS, EPOCHS, PARTS = 400, 40, 30, 2, 2


@dataclass(frozen=True)
class Answers:
    """One sampled response to each held-out prompt: the rows, the texts, and what they are worth."""

    rows: list[dict[str, Any]]
    prompts: list[str]
    responses: list[str]

    @property
    def gold(self) -> list[float]:
        return [gold(row, text).total for row, text in zip(self.rows, self.responses, strict=True)]

    @property
    def words(self) -> list[float]:
        return [float(gold(row, text).words) for row, text in zip(self.rows, self.responses, strict=True)]

    def scores(self, reward: Reward) -> list[float]:
        """Return what `reward` gives the responses."""
        return torch.as_tensor(reward(self.prompts, self.responses, self.rows)).tolist()

    def gain(self, after: list[float], before: list[float]) -> tuple[float, float, float]:
        """Return the mean of after - before, prompt by prompt, with its 95% interval."""
        return mean_interval([a - b for a, b in zip(after, before, strict=True)], self.prompts)


class SmallWorld:
    """The models of one test run, each made when first asked for: an SFT model and what starts from it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, {}
        texts = (turn["content"] for row in rows("demonstrations", 4000) for turn in row["messages"])
        self.start = build_tiny(folder / "start", texts, vocab_size=768, hidden_size=64, layers=2, max_length=128)
        self.tokenizer = load_tokenizer(self.start)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what `make` makes, the same object every time `name` is asked for."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def data(self, kind: Callable[..., Any], steps: int, seed: int, **world: Any) -> Any:
        """Return `steps` batches of the world's training rows."""
        return kind(
            self.tokenizer, "world", batch_size=BATCH, max_length=128, row_tokens=512, seed=seed,
            cache_dir=self.folder / "cache", world={"rows": BATCH * steps, **world},
        )  # fmt: skip

    def write(self, module: Any, name: str) -> str:
        """Write the trained model and return its folder."""
        write_model(self.folder / name, module.export_model(), self.tokenizer, {})
        return str(self.folder / name)

    @property
    def sft(self) -> str:
        """The folder of a model trained on demonstrations of mixed quality."""

        def make() -> str:
            module = SFT(lambda: load_causal_lm(self.start), adam(4e-3, weight_decay=0.01), cosine)
            train(module, self.data(DemonstrationData, 125, 0), SFT_STEPS, gradient_clip_val=1.0)
            return self.write(module, "sft")

        return self.once("sft", make)

    def dpo(self, seed: int, **labeller: float) -> Answers:
        """Return the answers of DPO from the SFT model, on preferences of this labeller."""

        def make() -> Answers:
            module = DPO(lambda: load_causal_lm(self.sft), adam(2e-4), cosine, beta=0.3, sft_coef=0.1)
            data = self.data(PreferenceData, DPO_STEPS, seed, labeller=labeller)
            train(module, data, DPO_STEPS, gradient_clip_val=1.0)
            return self.answers(module.trained_model())

        return self.once(f"dpo {seed} {labeller}", make)

    def reward_model(self, seed: int, steps: int, **labeller: float) -> str:
        """Return the folder of a reward model from the SFT model, on preferences of this labeller."""

        def make() -> str:
            module = RewardModel(lambda: load_scalar_model(self.sft, seed=seed), adam(1e-3), cosine)
            data = self.data(PreferenceData, steps, seed, labeller=labeller)
            train(module, data, steps, gradient_clip_val=1.0)
            return self.write(module, f"reward {seed} {steps} {labeller}")

        return self.once(f"reward {seed} {steps} {labeller}", make)

    def ppo(self, seed: int, reward: Reward, kl_beta: float, lr: float) -> Answers:
        """Return the answers of PPO from the SFT model."""
        torch.manual_seed(seed)  # of the value head
        module = PPO(
            lambda: load_causal_lm(self.sft), adam(lr, eps=1e-5), cosine, reward=reward, kl_beta=kl_beta, seed=seed,
            max_new_tokens=NEW_TOKENS, ppo_epochs=EPOCHS, num_minibatches=PARTS, microbatch_tokens=8192,
        )  # fmt: skip
        train(module, self.data(PromptData, PPO_ITERATIONS, seed), PPO_ITERATIONS * EPOCHS * PARTS)
        return self.answers(module.trained_model())

    def sft_answers(self) -> Answers:
        return self.once("sft answers", lambda: self.answers(load_causal_lm(self.sft)))

    def answers(self, lm: Any) -> Answers:
        """Sample one response to every held-out prompt, with the same random numbers for every model."""
        data = PromptData(
            self.tokenizer, None, "world", max_length=128, cache_dir=self.folder / "cache", world={"val_rows": HELD_OUT}
        )
        data.setup()
        engine = LocalEngine()
        engine.start(lm, data.template.eos_ids)
        prompts = [data.group("val", row) for row in range(HELD_OUT)]
        answers = answer(engine, data.template, prompts, max_new_tokens=NEW_TOKENS, seed_parts=("learning",))
        return Answers(answers.metadata, answers.prompts, answers.texts)


cosine = partial(schedule, shape="cosine", warmup=0.05)


def adam(lr: float, **options: Any) -> Callable[..., torch.optim.Optimizer]:
    """Return AdamW with the betas of the configs."""
    return partial(torch.optim.AdamW, **({"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.0} | options))


def train(module: LightningModule, data: Any, steps: int, **options: Any) -> None:
    """Train for `steps` updates."""
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, **options,
    )  # fmt: skip
    trainer.fit(module, data)
