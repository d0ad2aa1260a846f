"""Weights that are read after the model is sharded: every rank reads its part of the files and holds no whole model.

Until then the parameters are on the meta device. A model that cannot be loaded so is loaded whole, with one log line.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, cast
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from rlhf_lightning.models.shards import local_part, slices

log = logging.getLogger(__name__)
_WANTED: ContextVar[bool] = ContextVar("deferred", default=False)
# module -> name of its parameter -> file and tensor in it; by module, whose names LoRA changes
_SOURCES: WeakKeyDictionary[nn.Module, dict[str, tuple[str, str]]] = WeakKeyDictionary()


class _WholeError(Exception):
    """Why a model is loaded whole."""


@contextmanager
def deferred(wanted: bool = True) -> Iterator[None]:
    """Within it, loaders return models without weights where :func:`read_weights` can read them later."""
    token = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(token)


def is_wanted() -> bool:
    """Return whether a model may be loaded without its weights."""
    return _WANTED.get()


def without_weights(
    name: str, kind: Any, new: set[str], config: Any, trust_remote_code: bool = False, **options: Any
) -> Any:
    """Return a model on the meta device whose weights are known by file, with its buffers; None if they are not.

    Args:
        name: a folder or hub name.
        kind: an AutoModel class.
        new: parameters that no file has.
        options: of `from_config`: dtype and attn_implementation.
    """
    try:
        if getattr(config, "quantization_config", None) is not None:
            raise _WholeError("it is quantized")
        with _parameters_on_meta():
            model = kind.from_config(config, trust_remote_code=trust_remote_code, **options)
        if get_model_conversion_mapping(model, add_legacy=False):
            raise _WholeError(f"transformers converts the weights of {config.model_type}")
        if options["dtype"] != torch.float32 and _kept_in_float32(model):
            raise _WholeError(f"some weights of {config.model_type} stay in float32")
        sources = _find(model, _tensors(name), new)
    except _WholeError as reason:
        log.warning("every rank loads %s whole before it is sharded: %s", name, reason)
        return None
    for module, parameter, source in sources:
        _SOURCES.setdefault(module, {})[parameter] = source
    if model.can_generate():
        with suppress(OSError):  # it has none
            model.generation_config = GenerationConfig.from_pretrained(name)
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Make the parameters of new modules without memory; buffers, such as rotary frequencies, are computed."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    with patch.object(nn.Module, "register_parameter", on_meta):
        yield


def _kept_in_float32(model: PreTrainedModel) -> bool:
    return any(getattr(model, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))


def _tensors(name: str) -> dict[str, tuple[str, list[int]]]:
    """Return tensor -> file and shape of the safetensors files of a folder or hub model."""
    optional: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    if (single := cached_file(name, SAFE_WEIGHTS_NAME, **optional)) is not None:
        files: list[Any] = [single]
    elif (index := cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **optional)) is not None:
        files = get_checkpoint_shard_files(name, index)[0] or []
    else:
        raise _WholeError("it has no safetensors files")
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            found |= {key: (file, opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    return found


def _find(
    model: nn.Module, tensors: dict[str, tuple[str, list[int]]], new: set[str]
) -> Iterator[tuple[nn.Module, str, tuple[str, str]]]:
    """Return module, parameter and source of every parameter but those in `new`; tied ones have one source."""
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name, f"{prefix}.{name}".lstrip(".")))
    buffers = {name for name in model.state_dict() if name in dict(model.named_buffers())}
    if buffers & tensors.keys():
        raise _WholeError("its files have buffers")
    found = []
    for tied in places.values():
        names = [name for _, _, name in tied]
        if set(names) <= new:
            continue
        keys = [name for name in names if name in tensors]
        if len(keys) != 1:
            raise _WholeError(f"its files have {len(keys)} tensors for {names[0]}")
        file, shape = tensors[keys[0]]
        if shape != list(tied[0][0]._parameters[tied[0][1]].shape):  # type: ignore[union-attr]
            raise _WholeError(f"{names[0]} has another shape in its files")
        found += [(module, parameter, (file, keys[0])) for module, parameter, _ in tied]
    return iter(found)


@contextmanager
def placeholders(model: nn.Module) -> Iterator[None]:
    """Within it, parameters without weights are tensors on the CPU that take no memory: peft follows their device."""
    places = [(module, name) for module in model.modules() for name in _SOURCES.get(module, {})]
    originals = {(module, name): cast(nn.Parameter, module._parameters[name]) for module, name in places}
    stand_ins = {
        id(p): nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape), p.requires_grad) for p in originals.values()
    }
    for (module, name), parameter in originals.items():
        module._parameters[name] = stand_ins[id(parameter)]
    try:
        yield
    finally:
        for (module, name), parameter in originals.items():
            parameter.requires_grad_(stand_ins[id(parameter)].requires_grad)
            module._parameters[name] = parameter


@torch.no_grad()
def read_weights(root: nn.Module, device: torch.device) -> None:
    """Read the weights of a model without them onto `device`, of a sharded parameter only this rank's part."""
    made: dict[int, nn.Parameter] = {}
    to_read: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for module in root.modules():
        sources = _SOURCES.pop(module, {})
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                empty = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                made[id(parameter)] = empty
                file, key = sources[name]
                to_read.setdefault(file, []).append((key, empty))
            module._parameters[name] = made[id(parameter)]
    for file, parts in to_read.items():
        with safe_open(file, "pt") as opened:
            for key, parameter in parts:
                local, at = local_part(parameter)
                if local.numel():
                    local.copy_(opened.get_slice(key)[slices(at, local.shape)])
