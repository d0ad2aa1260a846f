"""Parts of `gpu.py`: ceilings, training, sampling and profiles of this package."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from gpu_models import (
    ITERATIONS,
    STEPS,
    Bench,
    Words,
    demonstrations,
    even_share,
    fit,
    optimizer,
    pairs,
    questions,
)
from lightning.pytorch import Callback
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from rlhf_lightning import DPO, PPO, SFT, RewardModel
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.ops.groups import Group, GroupList
from rlhf_lightning.runtime.step_time import forward_flops


def ceilings(bench: Bench, name: str) -> None:
    """Rates of a large matrix product and of a copy."""
    n, device = 8192 if bench.cuda else 1024, bench.device
    dtype = torch.bfloat16 if bench.cuda else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**30 if bench.cuda else 2**24, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = {}
    for rate, work in (("matmul", lambda: a @ b), ("copy", lambda: target.copy_(source))):
        work()
        seconds = []
        for _ in range(10):
            began = bench.sync()
            work()
            seconds.append(bench.sync() - began)
        times[rate] = statistics.median(seconds)
    bench.record(
        name, matmul_tflops=2 * n**3 / times["matmul"] / 1e12, copy_tb_s=2 * len(source) / times["copy"] / 1e12
    )


OFFLINE: dict[str, tuple[Any, Any, Callable[[Bench, int], list[Group]]]] = {
    # stage: its module, the loader of its model, the groups of a step
    "sft": (SFT, load_causal_lm, demonstrations),
    "reward": (RewardModel, load_scalar_model, pairs),
    "dpo": (DPO, load_causal_lm, pairs),
}


def offline(
    bench: Bench, name: str, stage: str, load: dict[str, Any] | None = None, precision: str | None = None
) -> None:
    """Steps of SFT, the reward model or DPO; `load` are arguments of the model's loader."""
    bench.reset()
    module, loader, groups = OFFLINE[stage]
    batches = [GroupList(groups(bench, step), bench.length) for step in range(STEPS)]
    timed = fit(bench, module(partial(loader, bench.folder, **(load or {})), optimizer), batches, precision)
    bench.record(name, **bench.summary(timed.seconds, timed.tokens, timed.flops, losses=timed.losses))


class TimedEngine(LocalEngine):
    """Keeps the seconds and the sampled tokens of every call."""

    def __init__(self, bench: Bench, **options: Any) -> None:
        super().__init__(**options)
        self.bench, self.seconds, self.tokens = bench, [], []

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        began = self.bench.sync()
        made = super().generate(*args, **kwargs)
        self.seconds.append(self.bench.sync() - began)
        self.tokens.append(sum(map(len, made.responses)))
        return made


def online(bench: Bench, name: str, prompts: int, n: int, **options: Any) -> None:
    """Iterations of PPO or GRPO with `n` responses to each prompt.

    The operations of its MFU are a forward pass for sampling, two for log-probs, and three in every epoch.
    """
    bench.reset()
    engine, new = TimedEngine(bench, batch_tokens=131_072), bench.length // 16
    module = PPO(
        partial(load_causal_lm, bench.folder), optimizer, reward=even_share, engine=engine, template=Words(),  # type: ignore[arg-type]
        num_generations=n, max_new_tokens=new, missing_eos_penalty=0.0, microbatch_tokens=8 * bench.length, **options,
    )  # fmt: skip
    batches = [GroupList(questions(bench, i, prompts)) for i in range(ITERATIONS)]
    timed = fit(bench, module, batches)
    sampling = statistics.median(engine.seconds[1:])
    step, sampled = statistics.median(timed.seconds[1:]), statistics.median(engine.tokens[1:])
    asked, tokens = bench.length // 8, prompts * bench.length // 8 + sampled
    pairs_seen = prompts * asked**2 / 2 + sampled * (asked + new / 2)
    flops = (3 + 3 * module.ppo_epochs) * forward_flops(bench.shape, tokens, sampled, pairs_seen)
    bench.record(
        name, step_s=step, first_s=timed.seconds[0], tokens_per_s=tokens / step, mfu=flops / step / bench.peak,
        sampling_s=sampling, sampling_share=sampling / step, responses_per_s=prompts * n / step,
        sampled_per_s=sampled / step, memory_gb=bench.peak_gb(), responses=prompts * n, new_tokens=new,
    )  # fmt: skip


GRPO = {
    "estimator": "grpo", "kl_in": "loss", "kl_estimator": "k3", "kl_beta": 0.05, "ppo_epochs": 1,
    "whiten_advantages": False,
}  # fmt: skip


def decoding(bench: Bench) -> tuple[Any, list[list[int]], int]:
    """Return a model on the device, prompts of 128 tokens for 64 sequences, and how many tokens to sample."""
    lm = load_causal_lm(bench.folder).to(bench.device).eval()
    count, size, new = (64, 128, 128) if bench.cuda else (4, 8, 8)
    return lm, [[1, *bench.words("decode", i, size=size - 1)] for i in range(count)], new


def decode(bench: Bench, name: str) -> None:
    """64 sequences of 128 new tokens after 128, with static shapes, without, and Hugging Face's generate."""
    bench.reset()
    lm, prompts, new = decoding(bench)
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
            lm.set_attn_implementation("group_sdpa")
        return found.numel() - ids.numel()

    rates = {}
    with bench.half():
        for kind, work in (("static", partial(ours, True)), ("plain", partial(ours, False)), ("generate", theirs)):
            work()
            seconds = []
            for _ in range(3):
                began = bench.sync()
                tokens = work()
                seconds.append(bench.sync() - began)
            rates[f"{kind}_tokens_per_s"] = tokens / statistics.median(seconds)
    ratio = rates["static_tokens_per_s"] / rates["generate_tokens_per_s"]
    bench.record(name, **rates, static_over_generate=ratio)


@contextmanager
def profiled(bench: Bench) -> Iterator[dict[str, Any]]:
    """Fill a dict with the kernels that take most time, and the time in which none runs."""
    activity = ProfilerActivity.CUDA if bench.cuda else ProfilerActivity.CPU
    figures: dict[str, Any] = {}
    bench.sync()
    with torch_profile(activities=[activity]) as profiler:
        began = time.perf_counter()
        yield figures
        seconds = bench.sync() - began
    device = DeviceType.CUDA if bench.cuda else DeviceType.CPU
    found = (e for e in profiler.events() if e.device_type == device and not e.is_user_annotation)
    events = sorted(found, key=lambda event: event.time_range.start)
    gaps, end = [], events[0].time_range.start
    for event in events:  # those of a CPU are nested
        gaps.append(max(event.time_range.start - end, 0) / 1e6)
        end = max(end, event.time_range.end)
    kernels: Counter[str] = Counter()
    for event in events:
        kernels[event.name[:70]] += (event.self_device_time_total if bench.cuda else event.self_cpu_time_total) / 1e6
    busy = sum(kernels.values())
    figures.update(
        step_s=seconds, busy_s=busy, busy_share=busy / seconds, launches=len(events), gaps_s=sum(gaps),
        longest_gaps_ms=[round(1e3 * gap, 3) for gap in sorted(gaps)[-3:]],
        kernels={key: round(value / busy, 3) for key, value in kernels.most_common(14)},
    )  # fmt: skip


class Profiled(Callback):
    """Profiles the third step."""

    def __init__(self, bench: Bench) -> None:
        self.profiler = profiled(bench)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index == 2:
            self.figures = self.profiler.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == 2:
            self.profiler.__exit__(None, None, None)


def profile(bench: Bench, name: str) -> None:
    """A step of DPO."""
    bench.reset()
    callback = Profiled(bench)
    batches = [GroupList(pairs(bench, step), bench.length) for step in range(3)]
    fit(bench, DPO(partial(load_causal_lm, bench.folder), optimizer), batches, callbacks=[callback])
    bench.record(name, **callback.figures)


def profile_decode(bench: Bench, name: str) -> None:
    """Prefill, the capture of the graph and half of the tokens of the part `decode`."""
    bench.reset()
    lm, prompts, new = decoding(bench)
    engine = LocalEngine(batch_tokens=10**6, static=True)
    engine.start(lm, [])
    with bench.half():
        engine.generate(prompts, max_new_tokens=new // 2)
        with profiled(bench) as figures:
            engine.generate(prompts, max_new_tokens=new // 2)
    bench.record(name, sequences=len(prompts), new_tokens=new // 2, **figures)
