"""Models sharded across devices: FSDP2 for weights, gradients and optimizer states, tensor parallelism for the layers.

Every forward pass of a sharded model is collective: ranks of a data-parallel group must make the same number of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapters import is_quantized
from rlhf_lightning.models.completion import unwrap
from rlhf_lightning.models.loading import decoder_layers

# decoder -> the module whose forward gathers its weights, and the mesh
_SHARDED: WeakKeyDictionary[nn.Module, tuple[nn.Module, Any]] = WeakKeyDictionary()


def shard(root: Any, mesh: Any) -> None:
    """Shard a CompletionModel or ScalarModel across a mesh (data_parallel, tensor_parallel)."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    lm = root.decoder
    if is_quantized(lm):
        raise UserError("adapter=qlora cannot be sharded; use strategy=ddp, or adapter=lora")
    if mesh["tensor_parallel"].size() > 1:
        parallelize(lm, mesh["tensor_parallel"])
    data = mesh["data_parallel"]
    if data.size() > 1:
        for layer in decoder_layers(unwrap(lm)):
            fully_shard(layer, mesh=data)
        if getattr(root, "value_head", None) is not None:
            fully_shard(root.value_head, mesh=data)  # float32 also where the decoder is not
        fully_shard(root, mesh=data)
        if hasattr(root, "decode"):
            register_fsdp_forward_method(root, "decode")
        _SHARDED[lm] = root, data


def parallelize(lm: Any, mesh: Any) -> None:
    """Split the attention heads and the MLP of every layer over `mesh`, by the plan of the model's architecture."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if unwrap(lm) is not lm:
        raise UserError("adapter=lora cannot be split by tensor parallelism; use strategy=fsdp2")
    config = lm.config.get_text_config()
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    plan = {name: kind for name, kind in (config.base_model_tp_plan or {}).items() if name.startswith("layers.")}
    if not plan or set(plan.values()) - set(styles):
        unknown = ", ".join(sorted(set(plan.values()) - set(styles))) or "none"
        raise UserError(
            f"{type(lm).__name__} cannot be split by tensor parallelism (its plan: {unknown}); use strategy=fsdp2"
        )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads % mesh.size() or config.num_attention_heads % mesh.size():
        raise UserError(
            f"{config.num_attention_heads} attention heads on {heads} keys cannot be split over {mesh.size()} devices; "
            "use strategy=fsdp2"
        )
    parallelize_module(lm.base_model, mesh, {name: styles[kind]() for name, kind in plan.items()})


def is_sharded(lm: nn.Module) -> bool:
    """Return whether the forward passes of `lm` are collective."""
    return lm in _SHARDED


def call(lm: nn.Module, **inputs: Any) -> Any:
    """Return the forward output of a causal LM, through the module that gathers its weights where it is sharded."""
    sharded = _SHARDED.get(lm)
    return sharded[0].decode(**inputs) if sharded else lm(**inputs)  # type: ignore[operator]


def max_over_ranks(lm: nn.Module, count: int) -> int:
    """Return the largest `count` of the ranks that must call `lm` equally often; `count` itself without sharding."""
    sharded = _SHARDED.get(lm)
    if sharded is None:
        return count
    from torch.distributed import ReduceOp, all_reduce

    _, mesh = sharded
    value = torch.tensor(count, device=mesh.device_type)
    all_reduce(value, ReduceOp.MAX, group=mesh.get_group())
    return int(value)


def broadcast_tp(mesh: Any, value: Any) -> Any:
    """Return `value` of the first rank that shares every layer: an engine or judge may answer each differently."""
    if mesh is None or mesh["tensor_parallel"].size() == 1:
        return value
    from torch.distributed import broadcast_object_list, get_global_rank

    group = mesh["tensor_parallel"].get_group()
    objects = [value]
    broadcast_object_list(objects, get_global_rank(group, 0), group=group)
    return objects[0]


def whole_state(lm: nn.Module) -> dict[str, Any]:
    """Return the full weights of a sharded model on the CPU of the first rank; other ranks get nothing."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(lm, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return `tensors` in lists that one fused operation may take: those on the same mesh, and those on none."""
    lists: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        lists.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(lists.values())


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of all gradients, whole and sharded ones, over all ranks."""
    norms: list[Any] = [get_total_norm(tensors) for tensors in by_mesh(gradients)]
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()
