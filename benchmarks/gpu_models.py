"""The model, the batches and the clock of `gpu.py`."""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from flops import step_flops
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from rlhf_lightning import PPO
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.ops.groups import Group, GroupList
from rlhf_lightning.ops.seeding import derive_seed
from rlhf_lightning.runtime.memory import Shape

SIZES = {
    # hidden, intermediate, layers, heads, key heads, vocabulary, row length
    "1b": (2048, 5632, 20, 16, 8, 32_768, 2048),
    "tiny": (64, 160, 2, 4, 2, 512, 64),
}
STEPS = 6  # of which the first two are warm-up
PROMPTS, GENERATIONS, ITERATIONS = 16, 8, 4  # of GRPO


class Bench:
    """The model, the device, and what was measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.began, self.results = args, time.perf_counter(), {}
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.cuda = torch.cuda.is_available()
        self.device = "cuda" if self.cuda else "cpu"
        self.precision = "bf16-mixed" if self.cuda else "32-true"
        *shape, self.vocabulary, self.length = SIZES[args.size]
        self.folder = str(self.out / "model")
        self.build(*shape)
        self.peak = args.peak * 1e12
        free = torch.cuda.mem_get_info()[0] if self.cuda else 8e9
        parameters = sum(p.numel() for p in load_causal_lm(self.folder).parameters())
        # float32 weights, gradients, two moments and a reference; then about 2.9 MB for each token of a billion
        room = (0.92 * free - 20 * parameters) / (2.9e6 * parameters / 1.078e9)
        self.rows = max(min(14, int(room / self.length)), 1)
        name = torch.cuda.get_device_name() if self.cuda else "CPU"
        hidden, intermediate, layers, heads, key_heads = shape
        keys = hidden * key_heads // heads
        self.shape = Shape(
            parameters, 0, hidden, intermediate, layers, keys, self.vocabulary, queries=hidden,
            layer_weights=layers * hidden * (2 * hidden + 2 * keys + 3 * intermediate),
        )  # fmt: skip
        self.record("machine", device=name, torch=torch.__version__, parameters=parameters, rows=self.rows)

    def build(self, hidden: int, intermediate: int, layers: int, heads: int, key_heads: int) -> None:
        """Write a model with random weights and a tokenizer whose words are its ids."""
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import WhitespaceSplit
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        words = Tokenizer(WordLevel({f"<{i}>": i for i in range(self.vocabulary)}, unk_token="<0>"))
        words.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<0>", eos_token="<2>", bos_token="<1>"
        ).save_pretrained(self.folder)
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=4096, bos_token_id=1,
            eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(self.device):
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(self.folder)

    def record(self, name: str, **values: Any) -> None:
        self.results[name] = values
        text = json.dumps(self.results, indent=1, default=str)
        (self.out / "gpu.json").write_text(text)
        print(
            f"[{time.perf_counter() - self.began:4.0f} s] {name}: {json.dumps(values, default=str)[:400]}", flush=True
        )

    def words(self, *parts: int | str, size: int) -> list[int]:
        """Return `size` random token ids that are no special tokens."""
        draw = torch.Generator().manual_seed(derive_seed(*parts))
        return torch.randint(3, self.vocabulary, (size,), generator=draw).tolist()

    def sync(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def half(self) -> Iterator[None]:
        """Without gradients, in the precision of training."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.cuda), torch.no_grad():
            yield

    def reset(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        return torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0

    def summary(self, seconds: list[float], tokens: list[float], flops: list[float], **more: Any) -> dict[str, Any]:
        """Return the figures of the timed steps: medians, and rates over their sum."""
        timed = slice(2, None)
        total = sum(seconds[timed])
        rate = sum(flops[timed]) / total
        return {
            "step_s": statistics.median(seconds[timed]), "first_s": seconds[0], "steps_s": seconds,
            "tokens_per_s": sum(tokens[timed]) / total, "tflops": rate / 1e12, "mfu": rate / self.peak,
            "memory_gb": self.peak_gb(), **more,
        }  # fmt: skip


class Timed(Callback):
    """Times steps, the device idle before and after each."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.seconds: list[float] = []
        self.tokens: list[float] = []
        self.flops: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = self.bench.sync()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.seconds.append(self.bench.sync() - self.began)
        if hasattr(batch, "targets"):
            self.tokens.append(batch.tokens)
            self.flops.append(step_flops(module, batch))
            self.losses.append(float(outputs["loss"]))


class Words:
    """A template whose words are token ids."""

    eos_ids = frozenset({2})

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"<{i}>" for i in ids)


def optimizer(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-5, fused=True)


def fit(
    bench: Bench, module: Any, batches: list[GroupList], precision: str | None = None, callbacks: Sequence[Any] = ()
) -> Timed:
    """Train on the batches and return their times."""
    timed = Timed(bench)
    trainer = Trainer(
        max_epochs=1, accelerator="gpu" if bench.cuda else "cpu", devices=1, logger=False,
        precision=precision or bench.precision,  # pyright: ignore[reportArgumentType]
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*callbacks, timed],
        gradient_clip_val=None if isinstance(module, PPO) else 1.0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return timed


def demonstrations(bench: Bench, step: int) -> list[Group]:
    return [Group([1], [bench.words("sft", step, r, size=bench.length - 1)]) for r in range(bench.rows)]


def pairs(bench: Bench, step: int) -> list[Group]:
    """Pairs whose prompt is three quarters of the tokens."""
    prompt, response = 3 * bench.length // 4, bench.length // 8
    return [
        Group(
            [1, *bench.words("p", step, r, size=prompt - 1)],
            [[*bench.words(c, step, r, size=response - 1), 2] for c in "cr"],
        )
        for r in range(bench.rows)
    ]


def even_share(prompts: Any, responses: list[str], metadata: Any) -> list[float]:
    """Return the share of even token ids."""
    words = [re.findall(r"<(\d+)>", text) for text in responses]
    return [sum(int(word) % 2 == 0 for word in text) / max(len(text), 1) for text in words]


def questions(bench: Bench, iteration: int, count: int) -> list[Group]:
    size = bench.length // 8
    return [Group([1, *bench.words("q", iteration, p, size=size - 1)], [], index=p) for p in range(count)]
