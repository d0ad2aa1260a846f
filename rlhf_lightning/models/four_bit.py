"""Frozen weights in 4 bits under LoRA (QLoRA, arXiv 2305.14314): NF4 with double quantization, by bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import UserError, needs
from rlhf_lightning.models.adapters import quantizable
from rlhf_lightning.models.completion import unwrap
from rlhf_lightning.models.peft import BaseTunerLayer

bnb: Any = needs("bitsandbytes", "qlora")


class Linear4bit(bnb.nn.Linear4bit):
    """A linear layer whose frozen weights have 4 bits; it computes in the precision of its input, or of autocast.

    Its weights are in no state dict: they are those of the model that the run starts from, which is quantized again.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = bnb.nn.Params4bit(layer.weight.detach(), quant_type="nf4", compress_statistics=True, module=self)
        self.weight = weight.to(layer.weight.device)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        # not bitsandbytes' own: it keeps the precision of the first call, rounds the bias in place, and on some CPUs
        # repacks the weights in evaluation, after which there are no gradients
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return bnb.matmul_4bit(x, self.weight, bias=bias, quant_state=self.state)

    @property
    def state(self) -> Any:
        """Scales and shape of the weights; a move to another device may leave them on the layer alone."""
        return getattr(self.weight, "quant_state", None) or self.quant_state

    def dequantized(self) -> nn.Linear:
        """Return the linear layer with the weights that this one computes with."""
        weight = bnb.functional.dequantize_4bit(self.weight.data, self.state)
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight, plain.bias = nn.Parameter(weight), self.bias
        return plain

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        unexpected_keys += [key for key in state_dict if key.startswith(prefix)]


def quantize(model: Any, keep: Any = ()) -> None:
    """Put the weights of a decoder's linear layers into 4 bits, in place; not those of its head.

    Args:
        keep: names of layers that stay as they are.

    Raises:
        UserError: there are no linear layers, or they are in double precision.
    """
    layers = quantizable(model, keep)
    if model.dtype == torch.float64:
        raise UserError("adapter.quantization: weights of float64 cannot be quantized; use model.load.dtype=float32")
    if not layers:
        raise UserError(f"adapter.quantization: {type(model).__name__} has no linear layers below its head")
    for name, layer in layers.items():
        model.set_submodule(name, Linear4bit(layer))
    model.is_loaded_in_4bit = True  # what peft asks for


def dequantize(model: Any) -> None:
    """Turn 4-bit layers into plain ones, in place; LoRA on them is merged into the plain weights."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer) and isinstance(base := layer.get_base_layer(), Linear4bit):
            plain = base.dequantized()
            for adapter in layer.active_adapters:
                plain.weight.data += layer.get_delta_weight(adapter)  # type: ignore[operator]
            model.set_submodule(name, plain)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            model.set_submodule(name, layer.dequantized())
    inner: Any = unwrap(model)
    inner.is_loaded_in_4bit = False
