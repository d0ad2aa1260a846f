"""Models sharded across devices: FSDP2 for weights, gradients and optimizer states, tensor parallelism for the layers.

Every forward pass of a sharded model is collective: ranks of a data-parallel group must make the same number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.attention import HALF
from rlhf_lightning.models.completion import unwrap
from rlhf_lightning.models.deferred import read_weights
from rlhf_lightning.models.layers import decoder_layers, not_compiled

# decoder -> the module whose forward gathers its weights, and the mesh
_SHARDED: WeakKeyDictionary[nn.Module, tuple[nn.Module, Any]] = WeakKeyDictionary()
_GATHERED: WeakSet[nn.Module] = WeakSet()
NORMS = (nn.LayerNorm, nn.RMSNorm)  # on a CPU they take no weights of another precision than their inputs


def shard(root: Any, mesh: Any, frozen: bool = False) -> None:
    """Shard a CompletionModel or ScalarModel across a mesh (data_parallel, tensor_parallel), and read its weights.

    Under autocast the weights of the layers are gathered in its precision: autocast would gather them in theirs and
    keep a converted copy of all from the forward to the backward pass. Gradients are added in float32.

    Args:
        frozen: it makes no backward passes, after which the embeddings of others are given back.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    lm = root.decoder
    data, layers, kind = mesh["data_parallel"], mesh["tensor_parallel"], mesh.device_type
    if layers.size() > 1:
        parallelize(lm, layers)
    if data.size() > 1 or layers.size() == 1:
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        added = torch.float32 if autocast or unwrap(lm).dtype in HALF else None
        whole = MixedPrecisionPolicy(reduce_dtype=added, cast_forward_inputs=False)
        for layer in decoder_layers(unwrap(lm)):
            halved = not any(isinstance(part, NORMS) for part in layer.modules())
            fully_shard(layer, mesh=data, mp_policy=replace(whole, param_dtype=autocast) if halved else whole)
        if getattr(root, "value_head", None) is not None:
            fully_shard(root.value_head, mesh=data)  # float32 also where the decoder is not
        fully_shard(root, mesh=data, reshard_after_forward=True if frozen else None, mp_policy=whole)
        for method in ("decode", "run"):
            register_fsdp_forward_method(root, method)
        _SHARDED[lm] = root, data
    read_weights(root, torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind))


@torch.no_grad()
def run_inside(root: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, which calls parts of a CompletionModel or ScalarModel, with their weights gathered."""
    if root.decoder not in _SHARDED:
        return function(*args)
    result = root.run(function, *args)
    root.reshard()
    return result


@contextmanager
def gathered(lm: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within it, keep the whole weights of a sharded model on every rank: its forward passes are not collective.

    Args:
        wanted: False leaves it sharded.
    """
    from torch.distributed.fsdp import FSDPModule

    if not wanted or lm not in _SHARDED:
        yield
        return
    parts = [part for part in _SHARDED[lm][0].modules() if isinstance(part, FSDPModule)]
    layers = parts[1:]  # the first is the root, which gives nothing back after a forward pass anyway
    for part in layers:
        part.set_reshard_after_forward(False)
    for part in parts:
        part.unshard()
    _GATHERED.add(lm)
    try:
        yield
    finally:
        _GATHERED.discard(lm)
        for part in layers:
            part.set_reshard_after_forward(True)
        for part in parts:
            part.reshard()


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


def has_parts(lm: nn.Module) -> bool:
    """Return whether ranks hold parts of the weights of `lm`, by FSDP2 or by tensor parallelism."""
    return any(hasattr(parameter, "to_local") for parameter in lm.parameters())


def call(lm: nn.Module, **inputs: Any) -> Any:
    """Return the forward output of a causal LM, through the module that gathers its weights where it is sharded."""
    sharded = _SHARDED.get(lm)
    with not_compiled(unwrap(lm)):
        return sharded[0].decode(**inputs) if sharded else lm(**inputs)  # type: ignore[operator]


def max_over_ranks(lm: nn.Module, count: int) -> int:
    """Return the largest `count` of the ranks that must call `lm` equally often; `count` itself without sharding."""
    sharded = _SHARDED.get(lm)
    if sharded is None or lm in _GATHERED:
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
