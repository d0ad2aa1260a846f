"""The decoder layers of a model, and compiling them.

A layer is compiled where completion groups are read, once for all layers and all lengths: they run the same code, and
sizes are dynamic. Attention stays outside (its runs are other Python objects in every batch), and so does decoding,
whose cache grows with every token.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface

from rlhf_lightning.models.attention import GROUP_SDPA, group_sdpa

BUCKET = 128
"""The lengths of rows that compiled layers read are multiples of it."""
BACKEND = "inductor"
VARIANTS = 32
"""Compiled versions of a layer that are kept: training or not, with or without gradients and adapter, one row or more;
torch keeps 8 and runs the layer without compiling from then on."""
_COMPILED: WeakSet[nn.Module] = WeakSet()  # models; a copy's layers are not compiled


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return the decoder layers of a model."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_layers(model: Any) -> None:
    """Compile every decoder layer at its first use."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    AttentionInterface.register(GROUP_SDPA, torch.compiler.disable(group_sdpa))
    for layer in decoder_layers(model):
        layer.compile(dynamic=True, backend=BACKEND)
    _COMPILED.add(model)


def is_compiled(model: nn.Module) -> bool:
    """Return whether the decoder layers of a Hugging Face model are compiled."""
    return model in _COMPILED


def bucketed(model: nn.Module, columns: Tensor, value: int = 0) -> Tensor:
    """Return (R, L) `columns`, for a compiled model filled up with `value` on the right to a multiple of 128."""
    rest = -columns.shape[1] % BUCKET if is_compiled(model) else 0
    return pad(columns, (0, rest), value=value) if rest else columns


def not_compiled(model: nn.Module) -> Any:
    """Return the context in which the layers of a model run as if they were not compiled."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()
