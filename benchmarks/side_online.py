"""One side of a comparison of online RL: a process that samples, scores and updates once on request.

The protocol is that of side.py. The prompts come from a file, as messages and as token ids, because the side that runs
PPO in TRL 1.12.0 lives in an environment without this package.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from side import answer, optimizer, wait


def vowel_share(text: str) -> float:
    """Return a reward that costs nothing and that different samples rarely share."""
    return sum(character in "aeiou" for character in text.lower()) / max(len(text), 1)


class Clock:
    """Adds up the seconds of the parts of a step."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return `work`, which now also counts towards the part `name`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - began

        return run

    def start(self) -> None:
        """Wait for the turn of this side and begin a step."""
        wait()
        self.parts.clear()
        self.began = time.perf_counter()

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self.began

    def report(self, loss: float, kl: float, tokens: float, lengths: list[int], rewards: list[float]) -> None:
        report = {"loss": loss, "kl": kl, "prompt_tokens": tokens, "lengths": lengths, "rewards": rewards}
        answer(seconds=self.seconds, parts=self.parts, **report)


# ---- this package --------------------------------------------------------------------------------------------------


def our_reward(spec: dict[str, Any]) -> Any:
    if spec["kind"] != "ppo":
        return lambda prompts, responses, metadata: [vowel_share(text) for text in responses]
    from rlhf_lightning.rewards.folder import FolderReward

    return FolderReward(spec["reward"])


def our_options(spec: dict[str, Any]) -> dict[str, Any]:
    """Return what turns our PPO into the algorithm of TRL's trainer."""
    common = {
        "num_generations": spec["samples"], "max_new_tokens": spec["new_tokens"], "temperature": 1.0,
        "kl_beta": spec["beta"], "missing_eos_penalty": 0.0, "max_grad_norm": 1.0, "microbatch_tokens": spec["micro"],
    }  # fmt: skip
    if spec["kind"] == "ppo":  # our defaults are the paper's and TRL's: 4 epochs, clip 0.2, value 0.1
        from rlhf_lightning.models.loading import load_scalar_model

        critic = None if spec["critic"] == "value_head" else partial(load_scalar_model, spec["reward"], trained=True)
        theirs = {"critic_lr": spec["lr"], "critic_lam": 0.95}  # TRL's critic has the rate and lambda of its policy
        return common | theirs | {"estimator": "gae", "ppo_epochs": 4, "num_minibatches": 1, "load_critic": critic}
    how = {"grpo": ("loss", "k3"), "rloo": ("reward", "k1")}[spec["kind"]]
    algorithm = {"estimator": spec["kind"], "kl_in": how[0], "kl_estimator": how[1], "ppo_epochs": 1}
    return common | algorithm | {"whiten_advantages": False}


def our_module(spec: dict[str, Any], clock: Clock) -> Any:
    """Return our PPO, whose parts are timed and whose rollout is kept."""
    from rlhf_lightning import PPO
    from rlhf_lightning.models.loading import load_causal_lm

    class Watched(PPO):
        def rollout(self, *args: Any, **kwargs: Any) -> Any:
            self.last = clock.timed("rollout", super().rollout)(*args, **kwargs)
            return self.last

        def logprobs(self, *args: Any) -> None:
            clock.timed("forwards", super().logprobs)(*args)

        def update(self, *args: Any) -> Any:
            return clock.timed("update", super().update)(*args)

        def configure_optimizers(self) -> Any:
            adamw: Any = super().configure_optimizers()
            adamw.step = clock.timed("optimizer", adamw.step)
            return adamw

    reward = clock.timed("reward", our_reward(spec))
    return Watched(partial(load_causal_lm, spec["model"]), optimizer(spec), reward=reward, **our_options(spec))


def our_side(spec: dict[str, Any]) -> None:
    from lightning.pytorch import Callback, Trainer

    from rlhf_lightning.stages.run import quiet

    quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    clock = Clock()
    module = our_module(spec, clock)

    class Steps(Callback):
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            if spec["fixed"]:  # no token ends a response; not earlier, for the first look at the rows wants one
                trainer.datamodule.template.eos_ids = set()
                module.policy.lm.config.eos_token_id = module.policy.lm.generation_config.eos_token_id = None
            answer(ready=True)

        def on_train_batch_start(self, *_: Any) -> None:
            clock.start()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            clock.stop()
            metrics, rollout = trainer.callback_metrics, module.last
            tokens = sum(len(group.prompt) for group in batch.groups)
            lengths, scores = rollout.mask.sum(1).tolist(), rollout.scores.tolist()
            clock.report(metrics["policy/loss"].item(), metrics["kl/reference"].item(), tokens, lengths, scores)

    trainer = Trainer(
        max_epochs=1, accelerator="cpu", precision="32-true", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        use_distributed_sampler=False, callbacks=[Steps()],
    )  # fmt: skip
    trainer.fit(module, our_data(spec))
    wait()  # for the end


def our_data(spec: dict[str, Any]) -> Any:
    """Return the data module over the prompts of the file; online.py makes the same one to learn its order."""
    from rlhf_lightning import PromptData
    from rlhf_lightning.models.loading import load_tokenizer

    rows = [{"prompt": row["prompt"]} for row in read_prompts(spec)]
    tokenizer = load_tokenizer(spec["model"])
    return PromptData(tokenizer, rows, batch_size=spec["prompts"], max_length=10_000, cache_dir=spec["cache"])


def read_prompts(spec: dict[str, Any]) -> list[dict[str, Any]]:
    with open(spec["data"]) as file:
        return json.load(file)


# ---- TRL -----------------------------------------------------------------------------------------------------------


def their_model(kind: Any, folder: str) -> Any:
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def their_tokenizer(spec: dict[str, Any]) -> Any:
    """Return the tokenizer with the padding token that this package gives it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    tokenizer.pad_token_id, tokenizer.padding_side = spec["pad_id"], "left"
    return tokenizer


def their_settings(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the common settings of TRL's trainers."""
    return {
        "output_dir": spec["cache"] + "/trl", "use_cpu": True, "bf16": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "optim": "adamw_torch",
        "learning_rate": spec["lr"], "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0,
        "per_device_train_batch_size": spec["prompts"] * spec["samples"], "temperature": 1.0,
    } | spec["options"]  # fmt: skip


def their_side(spec: dict[str, Any]) -> None:
    """Run GRPO or RLOO in TRL's trainer; its reward function sees what was sampled."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback

    clock = Clock()
    seen: dict[str, Any] = {"tokens": 0.0}

    def reward(completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        seen["lengths"] = [len(ids) for ids in completion_ids]
        seen["rewards"] = [vowel_share(turns[0]["content"]) for turns in completions]
        return seen["rewards"]

    class Steps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            answer(ready=True)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.stop()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in logs:  # the summary of the run
                return
            total, seen["tokens"] = logs["num_tokens"] - seen["tokens"], logs["num_tokens"]
            tokens = (total - sum(seen["lengths"])) / spec["samples"]  # TRL counts a prompt once per sample
            clock.report(float(logs["loss"]), float(logs["kl"]), tokens, seen["lengths"], seen["rewards"])

    config, kind = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}[spec["kind"]]
    settings = their_settings(spec) | {
        "num_generations": spec["samples"], "max_completion_length": spec["new_tokens"], "beta": spec["beta"],
        "num_train_epochs": 1, "shuffle_dataset": False,
    }  # fmt: skip
    if spec["kind"] == "grpo":  # the loss that tests/oracle finds equal to ours
        settings |= {"loss_type": "dapo", "use_bias_correction_kl": False}
    if spec["fixed"]:
        settings["generation_kwargs"] = {"min_new_tokens": spec["new_tokens"]}
    trainer = kind(
        their_model(AutoModelForCausalLM, spec["model"]), reward_funcs=reward, args=config(**settings),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in read_prompts(spec)]),
        processing_class=their_tokenizer(spec), callbacks=[Steps()],
    )  # fmt: skip
    trainer._generate = clock.timed("rollout", trainer._generate)
    trainer.train()
    wait()


def their_ppo(spec: dict[str, Any]) -> None:
    """Run PPO in the trainer of TRL 1.12.0, which trains in a loop of its own and begins a step unannounced."""
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    clock, tokenizer = Clock(), their_tokenizer(spec)
    seen: dict[str, Any] = {}
    generate = clock.timed("rollout", ppo_trainer.batch_generation)
    score = ppo_trainer.get_reward

    def batch_generation(model: Any, queries: Any, *args: Any) -> Any:
        generated = generate(model, queries, *args)
        ends = generated[0][:, queries.shape[1] :] == tokenizer.eos_token_id
        first = torch.where(ends.any(1), ends.int().argmax(1) + 1, ends.shape[1])
        seen["lengths"] = ([ends.shape[1]] * len(ends)) if spec["fixed"] else first.tolist()
        seen["tokens"] = int((queries != tokenizer.pad_token_id).sum())
        return generated

    def get_reward(model: Any, *args: Any) -> Any:
        rewards = clock.timed("values and reward", score)(model, *args)
        if model is trainer.reward_model:
            seen.setdefault("rewards", []).extend(rewards[1].tolist())
        return rewards

    ppo_trainer.batch_generation, ppo_trainer.get_reward = batch_generation, get_reward

    class Steps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            answer(ready=True)
            clock.start()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen["logs"] = logs

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.stop()
            loss, kl = (seen["logs"][name] for name in ("loss/policy_avg", "objective/kl"))
            clock.report(loss, kl, seen["tokens"], seen["lengths"], seen.pop("rewards"))
            clock.start()

    rows = [{"input_ids": row["ids"]} for row in read_prompts(spec)]
    settings = their_settings(spec) | {
        "response_length": spec["new_tokens"], "kl_coef": spec["beta"], "total_episodes": len(rows),
        "stop_token": None if spec["fixed"] else "eos", "num_sample_generations": 0,
    }  # fmt: skip
    policy, reference = (their_model(AutoModelForCausalLM, spec["model"]) for _ in range(2))
    reward, value = (their_model(AutoModelForSequenceClassification, spec["reward"]) for _ in range(2))
    dataset = Dataset.from_list(rows)
    trainer = PPOTrainer(
        PPOConfig(**settings), tokenizer, policy, reference, reward, dataset, value, callbacks=[Steps()]
    )
    # the trainer shuffles its prompts; both sides shall take the same ones in a step
    trainer.dataloader = DataLoader(dataset, trainer.local_dataloader_batch_size, collate_fn=trainer.data_collator)
    trainer.train()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    given = json.loads(sys.stdin.readline())
    {"ours": our_side, "trl": their_ppo if given["kind"] == "ppo" else their_side}[given["side"]](given)
