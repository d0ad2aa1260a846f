"""Parts of `gpu.py`: TRL on the same work, after this package in the same process."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from gpu_models import (
    GENERATIONS,
    ITERATIONS,
    PROMPTS,
    STEPS,
    Bench,
    Words,
    demonstrations,
    even_share,
    pairs,
    questions,
)


def trl_steps(bench: Bench, kind: str, rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """Return seconds and losses of TRL's trainer on `rows`, one step each `bench.rows`."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    bench.reset()
    seconds: list[float] = []
    losses: list[float] = []

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = bench.sync()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(bench.sync() - self.began)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    model = AutoModelForCausalLM.from_pretrained(bench.folder, dtype=torch.float32, attn_implementation="sdpa")
    settings = {
        "output_dir": str(bench.out / "trl"), "use_cpu": not bench.cuda, "bf16": bench.cuda, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "optim": "adamw_torch_fused",
        "learning_rate": 1e-5, "lr_scheduler_type": "constant", "weight_decay": 0.01, "max_grad_norm": 1.0,
        "per_device_train_batch_size": bench.rows, "gradient_checkpointing": False, "num_train_epochs": 1,
        "dataloader_pin_memory": False,
    } | {key: value for key, value in options.items() if key != "reward"}  # fmt: skip
    more = {"reward_funcs": options.pop("reward")} if "reward" in options else {}
    trainer = getattr(trl, f"{kind}Trainer")(
        model, **more, args=getattr(trl, f"{kind}Config")(**settings), train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(bench.folder), callbacks=[Steps()],
    )  # fmt: skip
    trainer.train()
    return {
        "step_s": statistics.median(seconds[2:]),
        "steps_s": seconds,
        "losses": losses,
        "memory_gb": bench.peak_gb(),
    }


def beside(bench: Bench, name: str, part: str, theirs: dict[str, Any]) -> None:
    """Record TRL's figures, and the ratio to those of a part of this package."""
    ours = bench.results.get(part, {})
    ratio = theirs["step_s"] / ours["step_s"] if "step_s" in ours else None
    bench.record(name, ratio=ratio, our_losses=ours.get("losses"), **theirs)


def trl_sft(bench: Bench, name: str) -> None:
    rows = [{"input_ids": [1, *g.responses[0]]} for s in range(STEPS) for g in demonstrations(bench, s)]
    order = {"train_sampling_strategy": "sequential", "max_length": bench.length}
    beside(bench, name, "sft", trl_steps(bench, "SFT", rows, **order))


def trl_dpo(bench: Bench, name: str) -> None:
    def text(ids: Any) -> str:
        return Words().decode(ids)

    # TRL ends a response with EOS
    rows = [
        {"prompt": text(g.prompt)}
        | {k: " " + text(r[:-1]) for k, r in zip(("chosen", "rejected"), g.responses, strict=True)}
        for s in range(STEPS)
        for g in pairs(bench, s)
    ]
    order = {"train_sampling_strategy": "sequential", "max_length": 2 * bench.length}
    beside(bench, name, "dpo", trl_steps(bench, "DPO", rows, **order))


def trl_grpo(bench: Bench, name: str) -> None:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return even_share(None, completions, None)

    rows = [{"prompt": Words().decode(g.prompt)} for i in range(ITERATIONS) for g in questions(bench, i, PROMPTS)]
    parts = 8  # microbatches of 16 responses: as many tokens as ours
    options = {
        "reward": reward, "num_generations": GENERATIONS, "max_completion_length": bench.length // 16, "beta": 0.05,
        "per_device_train_batch_size": PROMPTS * GENERATIONS // parts, "gradient_accumulation_steps": parts,
        "shuffle_dataset": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
    }  # fmt: skip
    theirs = trl_steps(bench, "GRPO", rows, **options)
    beside(bench, name, "grpo", theirs | {"step_s": statistics.median(theirs["steps_s"][1:])})
