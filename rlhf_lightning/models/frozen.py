"""A frozen model that a module holds without registering it."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

ModelT = TypeVar("ModelT", bound=nn.Module)


class Frozen(Generic[ModelT]):
    """Holds a model in eval mode, without gradients, outside of any `state_dict`.

    It is not an `nn.Module` on purpose: a registered reference would be written into every checkpoint, wrapped by the
    strategy, and trained by mistake. Call it with the device the batch is on.
    """

    def __init__(self, model: ModelT) -> None:
        self.model = model.eval().requires_grad_(False)
        self._on_cpu: list[Tensor] | None = None  # the weights, once they have come back from an accelerator

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> Frozen[ModelT]:
        """Move the model, if it is not there, and return self.

        What comes back from an accelerator stays in pinned memory of the CPU: the weights never change, so later moves
        there copy nothing, and moves to the accelerator do not wait.
        """
        device = torch.device(device)
        if self.device == device or (device.index is None and self.device.type == device.type):
            return self
        if device.type != "cpu" and self._on_cpu is None:
            self.model.to(device)
            return self
        for tensor, kept in zip(self.tensors(), self.on_cpu(), strict=True):
            tensor.data = kept if device.type == "cpu" else kept.to(device, non_blocking=True)
        return self

    def tensors(self) -> list[Tensor]:
        """Return the parameters and buffers, each once."""
        return [*self.model.parameters(), *self.model.buffers()]

    def on_cpu(self) -> list[Tensor]:
        """Return the weights on the CPU, pinned where they come from an accelerator; the copy is made once."""
        if self._on_cpu is None:
            self._on_cpu = [
                torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)
                for tensor in self.tensors()
            ]
        return self._on_cpu

    def __deepcopy__(self, memo: Any) -> Frozen[ModelT]:
        """Return self: copies of a module, such as WeightAveraging's, share what never changes."""
        return self

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
