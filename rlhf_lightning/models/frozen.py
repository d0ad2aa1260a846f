"""A frozen model that a module holds without registering it."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import nn

ModelT = TypeVar("ModelT", bound=nn.Module)


class Frozen(Generic[ModelT]):
    """Holds a model in eval mode, without gradients, outside of any `state_dict`.

    It is not an `nn.Module` on purpose: a registered reference would be written into every checkpoint, wrapped by the
    strategy, and trained by mistake. Call it with the device the batch is on.
    """

    def __init__(self, model: ModelT) -> None:
        self.model = model.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> Frozen[ModelT]:
        """Move the model and return self."""
        self.model.to(device)
        return self

    def __deepcopy__(self, memo: Any) -> Frozen[ModelT]:
        """Return self: copies of a module, such as WeightAveraging's, share what never changes."""
        return self

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)
