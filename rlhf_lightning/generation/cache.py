"""The key and value cache of sampling: appending a token writes in place, where Hugging Face copies the whole cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 64  # spare tokens in a newly allocated buffer


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values (B, H, T, D) are the front part of buffers with room for more tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: tuple[Tensor, Tensor] | None = None

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens (B, H, t, D) and return all of them."""
        past = self.get_seq_length()
        if not past:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        total = past + key_states.shape[-2]
        # selecting or repeating rows makes new tensors; then the buffers are allocated again
        in_buffers = self.buffers is not None and self.keys.data_ptr() == self.buffers[0].data_ptr()
        if self.buffers is None or not in_buffers or total > self.buffers[0].shape[-2]:
            self.buffers = with_room(self.keys, total), with_room(self.values, total)
        self.keys, self.values = (
            append(buffer, new, past) for buffer, new in zip(self.buffers, (key_states, value_states), strict=True)
        )
        return self.keys, self.values


def with_room(tensor: Tensor, total: int) -> Tensor:
    """Return a buffer for `total` tokens and some more that begins with `tensor`."""
    buffer = tensor.new_empty((*tensor.shape[:-2], total + ROOM, tensor.shape[-1]))
    buffer[..., : tensor.shape[-2], :] = tensor
    return buffer


def append(buffer: Tensor, new: Tensor, past: int) -> Tensor:
    """Write `new` behind `past` tokens and return the part of the buffer that is in use."""
    total = past + new.shape[-2]
    buffer[..., past:total, :] = new
    return buffer[..., :total, :]


def growing_cache(config: Any) -> DynamicCache:
    """Return the cache a model of `config` decodes with; sliding windows and state spaces keep their own layers."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
