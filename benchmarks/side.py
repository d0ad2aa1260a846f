"""One side of a comparison: a process that makes an optimizer step on request.

It reads a specification as JSON on its first line of standard input, builds a real Trainer, and then, for every line
"go", makes one step and answers with one line of JSON. The other side waits meanwhile, so that each side has the
machine to itself, and peak memory is measured per side.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import resource
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

import torch

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is not an answer


def answer(**values: Any) -> None:
    print(json.dumps(values), file=ANSWERS, flush=True)


def wait() -> None:
    """Return at the next "go"; leave at "end" with the peak memory of this process."""
    line = sys.stdin.readline().strip()
    if line != "go":
        answer(peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        os._exit(0)


def read_rows(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the first rows of a file, as prompt and chosen (and rejected)."""
    path = Path(spec["data"])
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [json.loads(line) for _, line in zip(range(spec["rows"]), lines, strict=False)]


def matmul_rate(size: int = 2048, seconds: float = 2.0) -> float:
    """Return the best float32 matmul rate of this process in FLOP/s."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best, began = 0.0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def optimizer(spec: dict[str, Any]) -> Any:
    return partial(torch.optim.AdamW, lr=spec["lr"], weight_decay=0.0, betas=(0.9, 0.999))


# ---- this package --------------------------------------------------------------------------------------------------


def our_data(spec: dict[str, Any]) -> Any:
    from rlhf_lightning import DemonstrationData, PreferenceData
    from rlhf_lightning.models.loading import load_tokenizer

    kind = DemonstrationData if spec["stage"] == "sft" else PreferenceData
    return kind(
        load_tokenizer(spec["model"]), read_rows(spec), batch_size=spec["batch"], max_length=spec["max_length"],
        cache_dir=spec["cache"],
    )  # fmt: skip


def our_side(spec: dict[str, Any]) -> None:
    from flops import step_flops
    from lightning.pytorch import Callback, Trainer

    from rlhf_lightning import DPO, SFT, RewardModel
    from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
    from rlhf_lightning.stages.run import quiet

    quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    kinds = {"sft": SFT, "reward": RewardModel, "dpo": DPO}
    load = load_scalar_model if spec["stage"] == "reward" else load_causal_lm
    module = kinds[spec["stage"]](
        partial(load, spec["model"], **spec.get("load", {})), optimizer(spec), **spec["options"]
    )
    rate, accumulate = matmul_rate(), spec.get("accumulate", 1)

    class Steps(Callback):
        def on_train_start(self, *_: Any) -> None:
            answer(ready=True, matmul_rate=rate)

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index % accumulate == 0:
                wait()
                self.parts: list[dict[str, float]] = []
                self.began = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            seconds = time.perf_counter() - self.began
            self.parts.append({
                "loss": float(outputs["loss"]),  # a microbatch's share of the mean
                "tokens": batch.tokens, "cells": batch.input_ids.numel(),
                "loss_tokens": len(batch.targets), "flops": step_flops(module, batch),
            })  # fmt: skip
            if len(self.parts) == accumulate:
                answer(seconds=seconds, **{key: sum(part[key] for part in self.parts) for key in self.parts[0]})

    trainer = Trainer(
        max_epochs=10_000, accelerator="cpu", precision=spec["precision"], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        gradient_clip_val=1.0, use_distributed_sampler=False, callbacks=[Steps()], accumulate_grad_batches=accumulate,
    )  # fmt: skip
    trainer.fit(module, our_data(spec))


# ---- TRL -----------------------------------------------------------------------------------------------------------


def their_side(spec: dict[str, Any]) -> None:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, TrainerCallback

    from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer

    torch.manual_seed(0)
    stage, tokenizer = spec["stage"], load_tokenizer(spec["model"])
    # we stop at the token that ends the turn; a newline that a template writes after it is one token more for TRL
    end = "'<|im_end|>' + '\n'"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        end, "'<|im_end|>' + ('' if loop.last and message['role'] == 'assistant' else '\n')"
    )
    data = our_data(spec)
    data.setup()
    order = [row for micro in data._plan() for row in micro.rows]
    rows = read_rows(spec)
    dataset = Dataset.from_list([conversation(rows[i], stage) for i in order])
    settings: dict[str, Any] = {
        "output_dir": spec["cache"] + "/trl", "use_cpu": True, "bf16": spec["precision"] != "32-true",
        "report_to": "none", "max_length": spec["max_length"],
        "save_strategy": "no", "disable_tqdm": True, "num_train_epochs": 10_000, "logging_steps": 1,
        "per_device_train_batch_size": spec["batch"], "train_sampling_strategy": "sequential", "optim": "adamw_torch",
        "learning_rate": spec["lr"], "lr_scheduler_type": "constant", "weight_decay": 0.0,
    }  # fmt: skip
    config = {"sft": trl.SFTConfig, "reward": trl.RewardConfig, "dpo": trl.DPOConfig}[stage]
    kind = {"sft": trl.SFTTrainer, "reward": trl.RewardTrainer, "dpo": trl.DPOTrainer}[stage]
    model = load_scalar_model(spec["model"]) if stage == "reward" else load_causal_lm(spec["model"])
    assert stage != "reward" or isinstance(model, type(AutoModelForSequenceClassification.from_config(model.config)))

    class Steps(TrainerCallback):
        tokens = 0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            answer(ready=True)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.began

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            total = int(logs.get("num_tokens", 0))
            answer(seconds=self.seconds, loss=float(logs["loss"]), tokens=total - self.tokens)
            self.tokens = total

    trainer = kind(
        model, args=config(**(settings | spec["options"])), train_dataset=dataset, processing_class=tokenizer,
        callbacks=[Steps()],
    )  # fmt: skip
    trainer.train()


def conversation(row: dict[str, Any], stage: str) -> dict[str, Any]:
    """Return a row of preferences as TRL's trainer of a stage wants it."""

    def say(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    if stage == "sft":
        return {"prompt": row["prompt"], "completion": say(row["chosen"])}
    return {"prompt": row["prompt"], "chosen": say(row["chosen"]), "rejected": say(row["rejected"])}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    given = json.loads(sys.stdin.readline())
    {"ours": our_side, "trl": their_side}[given["side"]](given)
