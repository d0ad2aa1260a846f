"""A model cut up over two devices: what every rank holds, reads, sends and rounds."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.dist]
LAYERS = 4


def held() -> int:
    """Return the bytes of all tensors of this process that are alive."""
    import torch

    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor):  # isinstance would ask lazy modules for their class, too
            local = getattr(found, "_local_tensor", found)
            storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def llama(**changes: Any) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    from tests.helpers.models import tiny_config

    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(**{"num_hidden_layers": LAYERS, "initializer_range": 0.2} | changes))


@contextmanager
def collectives() -> Iterator[Counter[str]]:
    """Count collectives by kind and precision."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    counts: Counter[str] = Counter()
    kinds = {"c10d._allgather_base_": "gather", "c10d._reduce_scatter_base_": "reduce", "c10d.allreduce_": "agree"}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if (kind := kinds.get(str(func).removesuffix(".default"))) is not None:
                dtype = next(x.dtype for x in tree_leaves(args) if isinstance(x, torch.Tensor))
                counts[f"{kind} {str(dtype).removeprefix('torch.')}"] += 1
            return func(*args, **kwargs or {})

    with Count():
        yield counts


def measure_sampling(mesh: Any, rank: int, folder: Path) -> dict[str, Any]:
    """Return the bytes held whole, cut up, at the most inside a layer while sampling, and after it."""
    from rlhf_lightning.generation.local import LocalEngine
    from rlhf_lightning.models.completion import CompletionModel
    from rlhf_lightning.models.layers import decoder_layers
    from rlhf_lightning.models.sharding import shard

    sizes = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 24, "num_key_value_heads": 4}
    model = CompletionModel(llama(**sizes))
    found, middle = {"whole": held()}, decoder_layers(model.lm)[12]
    shard(model, mesh)
    found["cut"] = held()
    inside: list[int] = []
    hook = middle.self_attn.register_forward_hook(lambda *_: inside.append(held()))
    # rank 1 has one prompt more, and no answer ends before it is as long as it may be
    engine = LocalEngine()
    engine.start(model.lm, [63])
    engine.generate([[1, 2, 3]] * (1 + rank), 2, max_new_tokens=6 + 4 * rank)
    hook.remove()
    return found | {"inside": max(inside), "after": held()}


def measure_loading(mesh: Any, rank: int, folder: Path) -> dict[str, Any]:
    """Return the most memory, in bytes, that a whole load and a deferred one take until the model is cut up."""
    from rlhf_lightning.models.adapters import load_model
    from rlhf_lightning.models.completion import CompletionModel
    from rlhf_lightning.models.loading import load_causal_lm
    from rlhf_lightning.models.sharding import shard

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))

    def growth(defer: bool) -> int:
        gc.collect()
        start, peak, done = anonymous(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.is_set():
                peak = max(peak, anonymous() - start)
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        model = CompletionModel(load_model(lambda: load_causal_lm(str(folder / "model")), defer=defer))
        shard(model, mesh)
        peak = max(peak, anonymous() - start)
        done.set()
        watcher.join()
        return peak

    growth(True)  # what libraries need at their first use
    return {"deferred": growth(True), "whole": growth(False)}


def measure_traffic(mesh: Any, rank: int, folder: Path) -> dict[str, Any]:
    """Return the collectives of sampling, sharded and gathered, of a log-probability pass and of an update."""
    import torch

    from rlhf_lightning.generation.local import LocalEngine
    from rlhf_lightning.models.completion import CompletionModel
    from rlhf_lightning.models.sharding import gathered, shard
    from rlhf_lightning.ops.groups import Group, pack

    model = CompletionModel(llama())
    shard(model, mesh)
    engine = LocalEngine()
    engine.start(model.lm, [63])
    engine.generate([[1, 2]], 1, max_new_tokens=2)  # compares decoding with a full forward pass once
    found: dict[str, Any] = {}
    samples = {}
    for name, keep in (("sharded", False), ("gathered", True)):
        with collectives() as counts, gathered(model.lm, keep):
            samples[name] = engine.generate([[1, 2, 3 + rank]], 2, max_new_tokens=5 + 3 * rank)
        found[name] = dict(counts)
    found["same"] = samples["sharded"] == samples["gathered"]
    batch = pack([Group([3, 4, 5 + rank], [[7, 8, 9], [11, 12]])])
    with torch.no_grad(), collectives() as counts:
        expected = model(batch).logprobs
    found["forward"] = dict(counts)
    with collectives() as counts:
        model(batch).logprobs.mean().backward()
    found["update"] = dict(counts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.step()
    with torch.no_grad():
        moved, before = model(batch).logprobs, engine.generate([[1, 2, 3]], 2, max_new_tokens=8)
        with gathered(model.lm):
            after = engine.generate([[1, 2, 3]], 2, max_new_tokens=8)
        found["fresh"] = before == after and not torch.equal(moved, expected)
        return found | {"again": torch.equal(model(batch).logprobs, moved)}


def measure_rounding(mesh: Any, rank: int, folder: Path) -> dict[str, Any]:
    """Return what mixed precision does to the gradient, on one device and cut up, and the converted weights it keeps."""
    import copy

    import torch

    from rlhf_lightning.models.completion import CompletionModel
    from rlhf_lightning.models.sharding import shard
    from rlhf_lightning.ops.groups import Group, pack

    base = llama(hidden_size=64, intermediate_size=256)
    batch = pack([Group([3, 4, 5, 6], [[7, 8, 9, 10], [11, 12, 13]]), Group([20, 21], [[30, 31, 32], [33, 34]])])

    def gradient(model: Any, half: bool = True) -> tuple[Any, int, dict[str, int]]:
        kept: dict[int, int] = {}

        def keep(tensor: Any) -> Any:
            if tensor.dtype == torch.bfloat16 and tensor.ndim == 2 and min(tensor.shape) >= 32:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # weights, not activations
            return tensor

        with collectives() as counts:
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
            with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = -model(batch).logprobs.mean()
            size = sum(storage.nbytes() for storage in kept.values())  # type: ignore[attr-defined]
            loss.backward()
        grads = [getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for p in model.parameters()]
        return torch.cat([g.flatten().double() for g in grads]), size, dict(counts)

    exact, _, _ = gradient(CompletionModel(copy.deepcopy(base).double()), half=False)
    one, kept_one, _ = gradient(CompletionModel(copy.deepcopy(base)))
    model = CompletionModel(base)
    with torch.autocast("cpu", torch.bfloat16):
        shard(model, mesh)
    two, kept_two, counts = gradient(model)
    weights = 2 * sum(p.numel() for p in base.model.layers.parameters())
    errors = {name: ((g - exact).norm() / exact.norm()).item() for name, g in (("one", one), ("two", two))}
    return errors | {"kept_one": kept_one / weights, "kept_two": kept_two / weights, "counts": counts}


MEASURES = {
    "sampling": measure_sampling,
    "loading": measure_loading,
    "traffic": measure_traffic,
    "rounding": measure_rounding,
}


def on_two_ranks(name: str, folder: Path) -> list[dict[str, Any]]:
    """Return what a measure returns on each of two ranks."""
    command = [sys.executable, "-m", "tests.models.test_sharding", name, str(folder)]
    ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.nightly
def test_sampling_leaves_no_full_copy(tmp_path: Path) -> None:
    for found in on_two_ranks("sampling", tmp_path):
        assert found["cut"] < 0.6 * found["whole"]
        assert found["after"] < 1.05 * found["cut"]
        # in the middle of a pass two or three layers of 24 are whole: this one and what is on its way; the rest are keys and values
        assert found["inside"] < 0.8 * found["whole"]


@pytest.mark.nightly
def test_a_rank_reads_its_part_of_the_weights(tmp_path: Path) -> None:
    """Of 100 MB in float32 the deferred load takes half and a layer; the whole load takes all of it."""
    model = llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_key_value_heads=4)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    model.bfloat16().save_pretrained(tmp_path / "model")  # of float32 files a whole load maps the pages
    del model
    for found in on_two_ranks("loading", tmp_path):
        assert found["deferred"] < 0.75 * size
        assert found["whole"] > 0.95 * size


@pytest.mark.nightly
def test_gathered_sampling_is_one_gather_a_layer(tmp_path: Path) -> None:
    """Otherwise it is one a layer and token, and the ranks agree before every token whether any goes on."""
    for found in on_two_ranks("traffic", tmp_path):
        passes = 9  # the longer rank's eight tokens, and a last dummy pass; the root's weights are gathered once
        assert found["sharded"]["gather float32"] in range(7 * LAYERS, passes * LAYERS + 2)
        assert found["sharded"]["agree int64"] >= 8
        assert found["gathered"].keys() == {"gather float32"}
        assert found["gathered"]["gather float32"] in (LAYERS, LAYERS + 1)  # the root's may be gathered before
        assert found["forward"]["gather float32"] <= LAYERS + 1
        assert found["update"] == {"gather float32": 2 * LAYERS, "reduce float32": LAYERS + 1}
        assert found["same"]
        assert found["fresh"]
        assert found["again"]


@pytest.mark.nightly
def test_mixed_precision_gathers_half_and_adds_gradients_in_float32(tmp_path: Path) -> None:
    for found in on_two_ranks("rounding", tmp_path):
        assert found["two"] == pytest.approx(found["one"], rel=0.05)
        assert found["one"] < 0.1
        assert found["counts"]["gather bfloat16"] >= LAYERS
        assert {kind for kind in found["counts"] if kind.startswith("reduce")} == {"reduce float32"}
        assert found["kept_one"] > 0.9  # autocast keeps every converted weight until the backward pass
        assert found["kept_two"] < 0.1


def main(name: str, folder: Path, rank: int) -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh

    import rlhf_lightning.models.sharding  # noqa: F401

    gc.freeze()  # what is imported holds no tensor of the model, and is most of what held() would look through
    init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    (folder / f"{rank}.json").write_text(json.dumps(MEASURES[name](mesh, rank, folder)))
    destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
