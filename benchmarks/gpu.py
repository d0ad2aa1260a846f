"""What a GPU computes right, and how fast, in one call of a few minutes: `make gpu`.

Parts run in order, each writes its figures into `<out>/gpu.json` before the next begins, and none is begun when the
time left is short. Models have random weights: a billion parameters in the shape of Llama (`--size tiny` tries the
program on a CPU). The last lines are a table.

MFU is the floating-point operations a step needs (`step_flops` in side.py: no padding, no attention outside of a
group, the head at tokens in the loss mask only, nothing recomputed) per second, as a share of the peak given by
`--peak` (dense bfloat16 of an H100 or H200: 989 TFLOP/s).
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table
from side import step_flops
from torch.utils.data import DataLoader

from rlhf_lightning import DPO, PPO, SFT, RewardModel
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.models.attention import GROUP_SDPA
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.ops.groups import Group, GroupList
from rlhf_lightning.ops.seeding import derive_seed

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
        with torch.device("cuda" if self.cuda else "cpu"):
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


def fit(bench: Bench, module: Any, batches: list[GroupList]) -> Timed:
    """Train on the batches and return their times."""
    timed = Timed(bench)
    trainer = Trainer(
        max_epochs=1, accelerator="gpu" if bench.cuda else "cpu", devices=1, logger=False,
        precision=bench.precision,  # pyright: ignore[reportArgumentType]
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[timed],
        gradient_clip_val=None if isinstance(module, PPO) else 1.0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return timed


# ---- parts ---------------------------------------------------------------------------------------------------------


def tests(bench: Bench) -> None:
    """The gpu tier of the tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    (bench.out / "tests.txt").write_text(done.stdout + done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
    bench.record("tests", rc=done.returncode, last=done.stdout.strip().splitlines()[-1:], failed=lines[:12])


def ceilings(bench: Bench) -> None:
    """Rates of a large matrix product and of a copy."""
    n, device = (8192, "cuda") if bench.cuda else (1024, "cpu")
    dtype = torch.bfloat16 if bench.cuda else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**30 if bench.cuda else 2**24, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = {}
    for name, work in (("matmul", lambda: a @ b), ("copy", lambda: target.copy_(source))):
        work()
        seconds = []
        for _ in range(10):
            began = bench.sync()
            work()
            seconds.append(bench.sync() - began)
        times[name] = statistics.median(seconds)
    bench.record(
        "ceilings", matmul_tflops=2 * n**3 / times["matmul"] / 1e12, copy_tb_s=2 * len(source) / times["copy"] / 1e12
    )


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


def offline(bench: Bench, name: str, module: Any, groups: Callable[[Bench, int], list[Group]]) -> None:
    bench.reset()
    timed = fit(bench, module, [GroupList(groups(bench, step), bench.length) for step in range(STEPS)])
    bench.record(name, **bench.summary(timed.seconds, timed.tokens, timed.flops, losses=timed.losses))


def sft(bench: Bench) -> None:
    offline(bench, "sft", SFT(partial(load_causal_lm, bench.folder), optimizer), demonstrations)


def reward(bench: Bench) -> None:
    offline(bench, "reward", RewardModel(partial(load_scalar_model, bench.folder), optimizer), pairs)


def dpo(bench: Bench) -> None:
    offline(bench, "dpo", DPO(partial(load_causal_lm, bench.folder), optimizer), pairs)


class TimedEngine(LocalEngine):
    """Adds up the seconds of generation."""

    def __init__(self, bench: Bench, **options: Any) -> None:
        super().__init__(**options)
        self.bench, self.seconds = bench, []

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        began = self.bench.sync()
        try:
            return super().generate(*args, **kwargs)
        finally:
            self.seconds.append(self.bench.sync() - began)


def even_share(prompts: Any, responses: list[str], metadata: Any) -> list[float]:
    """Return the share of even token ids."""
    words = [re.findall(r"<(\d+)>", text) for text in responses]
    return [sum(int(word) % 2 == 0 for word in text) / max(len(text), 1) for text in words]


def questions(bench: Bench, iteration: int, count: int) -> list[Group]:
    size = bench.length // 8
    return [Group([1, *bench.words("q", iteration, p, size=size - 1)], [], index=p) for p in range(count)]


def online(bench: Bench, name: str, prompts: int, n: int, **options: Any) -> None:
    bench.reset()
    engine, new = TimedEngine(bench, batch_tokens=131_072), bench.length // 16
    module = PPO(
        partial(load_causal_lm, bench.folder), optimizer, reward=even_share, engine=engine, template=Words(),  # type: ignore[arg-type]
        num_generations=n, max_new_tokens=new, missing_eos_penalty=0.0, microbatch_tokens=8 * bench.length, **options,
    )  # fmt: skip
    batches = [GroupList(questions(bench, i, prompts)) for i in range(ITERATIONS)]
    timed = fit(bench, module, batches)
    sampling = statistics.median(engine.seconds[1:])
    step = statistics.median(timed.seconds[1:])
    bench.record(
        name, step_s=step, first_s=timed.seconds[0], sampling_s=sampling, sampling_share=sampling / step,
        responses_per_s=prompts * n / step, memory_gb=bench.peak_gb(), responses=prompts * n, new_tokens=new,
    )  # fmt: skip


def grpo(bench: Bench) -> None:
    options = {"kl_in": "loss", "kl_estimator": "k3", "kl_beta": 0.05, "ppo_epochs": 1, "whiten_advantages": False}
    online(bench, "grpo", PROMPTS, GENERATIONS, estimator="grpo", **options)


def ppo(bench: Bench) -> None:
    online(bench, "ppo", 4 * PROMPTS, 1)


def decode(bench: Bench) -> None:
    """64 sequences of 128 new tokens after 128, with static shapes, without, and Hugging Face's generate."""
    lm = load_causal_lm(bench.folder).to("cuda" if bench.cuda else "cpu").eval()
    count, size, new = (64, 128, 128) if bench.cuda else (4, 8, 8)
    prompts = [[1, *bench.words("decode", i, size=size - 1)] for i in range(count)]
    ids = torch.tensor(prompts, device=lm.device)

    def ours(static: bool) -> int:
        engine = LocalEngine(batch_tokens=10**6, static=static)
        engine.start(lm, [])
        return sum(map(len, engine.generate(prompts, max_new_tokens=new).responses))

    def theirs() -> int:
        lm.set_attn_implementation("sdpa")
        try:
            options = {"do_sample": True, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0, "top_k": 0}
            found = lm.generate(ids, attention_mask=torch.ones_like(ids), **options)
        finally:
            lm.set_attn_implementation(GROUP_SDPA)
        return found.numel() - ids.numel()

    rates = {}
    with torch.autocast("cuda" if bench.cuda else "cpu", torch.bfloat16, enabled=bench.cuda), torch.no_grad():
        for name, work in (("static", partial(ours, True)), ("plain", partial(ours, False)), ("generate", theirs)):
            work()
            seconds = []
            for _ in range(3):
                began = bench.sync()
                tokens = work()
                seconds.append(bench.sync() - began)
            rates[f"{name}_tokens_per_s"] = tokens / statistics.median(seconds)
    ratio = rates["static_tokens_per_s"] / rates["generate_tokens_per_s"]
    bench.record("decode", **rates, static_over_generate=ratio)


def profile(bench: Bench) -> None:
    """The kernels of a DPO step that take most time, and the share of the step in which the device is busy."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    module = DPO(partial(load_causal_lm, bench.folder), optimizer)

    class Profiled(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index == 2:
                bench.sync()
                self.profiler = torch_profile(activities=[ProfilerActivity.CUDA])
                self.profiler.__enter__()
                self.began = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index == 2:
                self.seconds = bench.sync() - self.began
                self.profiler.__exit__(None, None, None)

    profiled = Profiled()
    trainer = Trainer(
        max_steps=3, accelerator="gpu", devices=1, precision="bf16-mixed", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[profiled], gradient_clip_val=1.0,
    )  # fmt: skip
    batches = [GroupList(pairs(bench, step), bench.length) for step in range(3)]
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    events = sorted(profiled.profiler.key_averages(), key=lambda e: -e.self_device_time_total)
    busy = sum(e.self_device_time_total for e in events) / 1e6
    top = {e.key[:70]: round(e.self_device_time_total / 1e6 / busy, 3) for e in events[:14]}
    bench.record("profile", step_s=profiled.seconds, busy_s=busy, busy_share=busy / profiled.seconds, kernels=top)


# ---- TRL -----------------------------------------------------------------------------------------------------------


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


def beside(bench: Bench, name: str, theirs: dict[str, Any]) -> None:
    ours = bench.results.get(name, {})
    ratio = theirs["step_s"] / ours["step_s"] if "step_s" in ours else None
    bench.record(f"trl_{name}", ratio=ratio, our_losses=ours.get("losses"), **theirs)


def trl_sft(bench: Bench) -> None:
    rows = [{"input_ids": [1, *g.responses[0]]} for s in range(STEPS) for g in demonstrations(bench, s)]
    order = {"train_sampling_strategy": "sequential", "max_length": bench.length}
    beside(bench, "sft", trl_steps(bench, "SFT", rows, **order))


def trl_dpo(bench: Bench) -> None:
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
    beside(bench, "dpo", trl_steps(bench, "DPO", rows, **order))


def trl_grpo(bench: Bench) -> None:
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
    beside(bench, "grpo", theirs | {"step_s": statistics.median(theirs["steps_s"][1:])})


PARTS: dict[str, tuple[Callable[[Bench], None], int]] = {
    # name: what runs, and the seconds it may need
    "tests": (tests, 40), "ceilings": (ceilings, 5), "sft": (sft, 15), "reward": (reward, 15), "dpo": (dpo, 15),
    "decode": (decode, 25), "grpo": (grpo, 25), "ppo": (ppo, 25), "trl_dpo": (trl_dpo, 30), "trl_sft": (trl_sft, 25),
    "trl_grpo": (trl_grpo, 50), "profile": (profile, 20),
}  # fmt: skip


def table(results: dict[str, Any]) -> Table:
    """Return the figures as a table."""
    made = Table(title=f"{results['machine']['device']}, torch {results['machine']['torch']}")
    columns = ("step_s", "tokens_per_s", "mfu", "memory_gb", "sampling_share", "ratio")
    for name in ("part", *columns, "more"):
        made.add_column(name)
    for name, values in results.items():
        cells = [f"{values[c]:,.3g}" if isinstance(values.get(c), float) else "" for c in columns]
        rest = {k: v for k, v in values.items() if k not in columns and isinstance(v, float | int | str)}
        more = ", ".join(f"{k}={v:,.4g}" if isinstance(v, float) else f"{k}={str(v)[:90]}" for k, v in rest.items())
        made.add_row(name, *cells, more)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="../outputs/benchmarks/gpu")
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--seconds", type=float, default=480, help="begin no part that may end later")
    parser.add_argument("--peak", type=float, default=989.0, help="peak TFLOP/s for MFU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bench = Bench(args)
    for name in args.parts:
        work, needed = PARTS[name]
        if time.perf_counter() - bench.began + needed > args.seconds:
            bench.record(name, skipped=f"{needed} s may be too many")
            continue
        try:
            work(bench)
        except Exception as error:  # the other parts are worth their figures
            bench.record(name, error=f"{type(error).__name__}: {str(error)[:300]}")
            (bench.out / f"{name}.txt").write_text(traceback.format_exc())
    Console(width=180).print(table(bench.results))


if __name__ == "__main__":
    main()
