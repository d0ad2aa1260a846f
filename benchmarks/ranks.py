"""Two ranks on the CPU against what `plan=true` computes for them: DDP and FSDP2 of a model of 30 million parameters.

Every round measures, one after the other, an all-reduce of known size, forward and backward without communication, a
step of DDP and a step of FSDP2, so that the load of the machine changes all of them alike. The first two give the rate
of the device and of its link; from these the other two are predicted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from rlhf_lightning.models.completion import CompletionModel
from rlhf_lightning.models.sharding import shard
from rlhf_lightning.ops.groups import Group, pack
from rlhf_lightning.runtime.memory import Job, Shape
from rlhf_lightning.runtime.step_time import Hardware, Step, bounds, forward_flops, step_seconds

HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCABULARY = 512, 1408, 8, 8, 8192
BYTES = 2**27  # of the all-reduce that measures the link


def model() -> CompletionModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return CompletionModel(LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, tie_word_embeddings=True, attn_implementation="sdpa",
    )))  # fmt: skip


def shape() -> Shape:
    layer = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE
    parameters = LAYERS * (layer + 2 * HIDDEN) + (VOCABULARY + 1) * HIDDEN
    return Shape(
        parameters, 0, HIDDEN, INTERMEDIATE, LAYERS, HIDDEN, VOCABULARY, queries=HIDDEN, layer_weights=LAYERS * layer
    )


def measure(rank: int, port: int, tokens: list[int], rounds: int, out: str) -> None:
    """Write the median seconds of each kind of step; rank 0 of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    whole, sharded = DistributedDataParallel(model(), gradient_as_bucket_view=True), model()
    shard(sharded, mesh)
    buffer = torch.zeros(BYTES // 4)
    found: dict[str, dict[str, float]] = {}
    for size in tokens:
        prompt = size // 8
        batch = pack([Group(list(range(3, prompt + 3)), [list(range(3, size - prompt + 3))])], row_tokens=size)

        def step(net: Any, batch: Any = batch) -> None:
            net.zero_grad()
            (-net(batch).logprobs.mean()).backward()

        def alone(step: Callable[..., None] = step) -> None:
            with whole.no_sync():
                step(whole)

        kinds: dict[str, Callable[[], Any]] = {
            "all_reduce": lambda: dist.all_reduce(buffer), "compute": alone,
            "ddp": lambda step=step: step(whole), "fsdp2": lambda step=step: step(sharded),
        }  # fmt: skip
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for number in range(rounds + 1):
            for name, work in kinds.items():
                dist.barrier()
                began = time.perf_counter()
                work()
                if number:  # the first round builds buckets and hooks
                    seconds[name].append(time.perf_counter() - began)
        found[str(size)] = {name: statistics.median(values) for name, values in seconds.items()}
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def predict(tokens: int, measured: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Return the seconds of a step, collectives hidden and not, from the rates of the device and of its link."""
    sizes, step = shape(), Step(tokens, tokens - tokens // 8, tokens**2 / 2, devices=2)
    rate = 3 * forward_flops(sizes, step.tokens, step.loss_tokens, step.pairs) / measured["compute"]
    link = BYTES / measured["all_reduce"] / 1e9  # 2 (n - 1) / n = 1
    hardware = Hardware("cpu", rate / 1e12, 1, 1e9, link, link, mfu=1.0, mbu=1.0, link_efficiency=1.0)
    jobs = {"ddp": Job(4, 4, tokens, tokens), "fsdp2": Job(4, 4, tokens, tokens, shards=2)}
    return {name: bounds(step_seconds(sizes, job, step, hardware)) for name, job in jobs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="../outputs/benchmarks/ranks.json")
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 256], help="tokens of a step of each rank")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--port", type=int, default=29617)
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    multiprocessing.spawn(measure, (args.port, args.tokens, args.rounds, args.out), nprocs=2)  # type: ignore[attr-defined]
    for size, measured in json.loads(Path(args.out).read_text()).items():
        link = BYTES / measured["all_reduce"] / 1e9
        print(f"{size} tokens: compute {measured['compute']:.3f} s, link {link:.2f} GB/s")
        for name, (least, most) in predict(int(size), measured).items():
            ratio = most / measured[name]
            print(f"  {name}: measured {measured[name]:.3f} s, computed {least:.3f} to {most:.3f} s, {ratio:.2f}")


if __name__ == "__main__":
    main()
