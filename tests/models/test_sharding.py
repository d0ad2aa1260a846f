"""A model cut up over two devices: layers gather their weights for a pass and give them back."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.dist]


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


def measure(rank: int, folder: str) -> None:
    """On one of two ranks: bytes held whole, cut up, at the most inside a layer while sampling, and after it."""
    import torch
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_lightning.generation.local import LocalEngine
    from rlhf_lightning.models.completion import CompletionModel
    from rlhf_lightning.models.layers import decoder_layers
    from rlhf_lightning.models.sharding import shard

    gc.freeze()  # what is imported holds no tensor of the model, and is most of what held() would look through
    init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    model = CompletionModel(LlamaForCausalLM(config))
    found, middle = {"whole": held()}, decoder_layers(model.lm)[12]
    shard(model, init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel")))
    found["cut"] = held()
    inside: list[int] = []
    hook = middle.self_attn.register_forward_hook(lambda *_: inside.append(held()))
    # rank 1 has one prompt more, and no answer ends before it is as long as it may be
    prompts = [[1, 2, 3]] * (1 + rank)
    engine = LocalEngine()
    engine.start(model.lm, [63])
    engine.generate(prompts, 2, max_new_tokens=6 + 4 * rank)
    hook.remove()
    found |= {"inside": max(inside), "after": held()}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    destroy_process_group()


@pytest.mark.nightly
def test_sampling_leaves_no_full_copy(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.models.test_sharding", str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["cut"] < 0.6 * found["whole"]
        assert found["after"] < 1.05 * found["cut"]
        # in the middle of a pass two or three layers of 24 are whole: this one and what is on its way; the rest are keys and values
        assert found["inside"] < 0.8 * found["whole"]


if __name__ == "__main__":
    measure(int(sys.argv[2]), sys.argv[1])
