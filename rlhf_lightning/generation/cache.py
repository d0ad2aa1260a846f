"""What sampling keeps of the tokens it has read: keys and values, states of hybrid layers, or the tokens themselves.

Appending a token to keys and values writes in place, where Hugging Face copies the whole cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rlhf_lightning.models.sharding import call

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


def select_rows(cache: DynamicCache | Reread, rows: Tensor) -> None:
    """Keep the sequences `rows` (B,) of a cache, in that order; one may be taken several times.

    By `reorder_cache`, which every layer has: `batch_select_indices` is missing in layers of states, and layers of
    states and attention inherit one that leaves the states as they are.
    """
    if isinstance(cache, Reread):
        cache.select(rows)
        return
    for layer in cache.layers:
        layer.reorder_cache(cast(torch.LongTensor, rows))


class Reread:
    """In place of a cache, for models whose cache does not work: every step reads all tokens of a sequence again.

    Rows are padded on the right, which no causal model reads.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        self.lengths = torch.tensor([len(p) for p in prompts], device=device)
        width = max(len(p) for p in prompts)
        self.ids = torch.tensor([[*p, *[0] * (width - len(p))] for p in prompts], device=device)

    def select(self, rows: Tensor) -> None:
        """Keep the sequences `rows` (B,), in that order."""
        self.ids, self.lengths = self.ids[rows], self.lengths[rows]
        self.ids = self.ids[:, : int(self.lengths.max())]

    def append(self, tokens: Tensor) -> None:
        """Add one token (B,) to every sequence."""
        self.ids = torch.cat([self.ids, torch.zeros_like(tokens)[:, None]], 1)
        self.ids[torch.arange(len(tokens), device=tokens.device), self.lengths] = tokens
        self.lengths = self.lengths + 1
        self.ids = self.ids[:, : int(self.lengths.max())]

    def logits(self, lm: nn.Module) -> Tensor:
        """Return the logits (B, V) after the last token of every sequence."""
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        mask = (places[None, :] < self.lengths[:, None]).long()
        output = call(lm, input_ids=self.ids, attention_mask=mask, use_cache=False)
        return output.logits[torch.arange(len(self.ids), device=self.ids.device), self.lengths - 1]
