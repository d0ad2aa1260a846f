"""Decoding with static shapes: one CUDA graph per batch size, and the host waits for the device every few tokens only.

In a plain loop the host launches every kernel of a step and waits for the device to know which sequences ended. Here
the state of a batch is in buffers that a step changes in place, so that the step can be captured once and replayed.
Sequences that ended stay in the batch until half of it has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

STEPS = 8  # tokens between two looks at which sequences are live
BLOCK = 128  # the cache holds a multiple of so many tokens


class StaticBatch:
    """B sequences that are extended by one token per :meth:`step`.

    Args:
        forward: (token (B, 1), mask (B, 1, 1, C), positions (B, 1), cache) -> logits (B, V).
        sample: (logits (B, V), uniforms (B,)) -> tokens (B,).
        token: (B,) first sampled token.
        length: (B,) its position.
        mask: (B, C) which of the cached tokens are real.
        cache: keys and values of C tokens, of which `past` are in use.
        uniforms: (B, T) one number for every token.
        limits: (B,) most tokens of each response.
        eos: (E,) tokens that end a response.
    """

    def __init__(
        self,
        forward: Callable[..., Tensor],
        sample: Callable[[Tensor, Tensor], Tensor],
        token: Tensor,
        length: Tensor,
        mask: Tensor,
        cache: Cache,
        past: int,
        uniforms: Tensor,
        limits: Tensor,
        eos: Tensor,
    ) -> None:
        self.forward, self.sample, self.cache, self.eos = forward, sample, cache, eos
        self.token, self.length, self.mask, self.uniforms, self.limits = token, length, mask, uniforms, limits
        device = token.device
        self.count = torch.ones((), dtype=torch.long, device=device)  # sampled tokens
        self.place = torch.full((1,), past, device=device)  # of the next token in the cache
        self.tokens = torch.zeros_like(uniforms, dtype=torch.long)
        self.tokens[:, 0] = token
        self.stopped = torch.isin(token, eos)
        self.live = ~self.stopped & (limits > 1)
        self.ends = torch.ones_like(token)

    def step(self) -> None:
        """Extend every live sequence by one token; all changes are in place."""
        self.mask.index_fill_(1, self.place, True)
        self.length += self.live  # no further than the context
        logits = self.forward(self.token[:, None], self.mask[:, None, None], self.length[:, None], self.cache)
        column = self.count.expand(len(self.token), 1)
        self.token.copy_(self.sample(logits, self.uniforms.gather(1, column).squeeze(1)))
        kept = torch.where(self.live, self.token, self.tokens.gather(1, column).squeeze(1))
        self.tokens.scatter_(1, column, kept[:, None])
        self.count += 1
        self.place += 1
        self.ends.copy_(torch.where(self.live, self.count, self.ends))
        stop = torch.isin(self.token, self.eos) & self.live
        self.stopped |= stop
        self.live &= ~stop & (self.count < self.limits)

    def select(self, rows: Tensor) -> StaticBatch:
        """Return a batch of the sequences `rows` in new buffers."""
        part = object.__new__(StaticBatch)
        part.__dict__ |= self.__dict__
        names = ("token", "length", "mask", "uniforms", "limits", "tokens", "stopped", "live", "ends")
        part.__dict__ |= {name: getattr(self, name)[rows] for name in names}
        part.count, part.place = self.count.clone(), self.place.clone()
        layers: Any = self.cache.layers
        part.cache = static_cache([(layer.keys[rows], layer.values[rows]) for layer in layers], self.past)
        return part

    @property
    def past(self) -> int:
        """Number of cached tokens."""
        return int(self.place)


def static_cache(keys_values: list[tuple[Tensor, Tensor]], past: int, capacity: int | None = None) -> Cache:
    """Return a cache that begins with the keys and values (B, H, C, D) of each layer and has `past` tokens in use.

    Args:
        capacity: makes room for so many tokens; None keeps C.
    """
    layers = []
    for keys, values in keys_values:
        layer: Any = StaticLayer(max_cache_len=capacity or keys.shape[2])
        layer.lazy_initialization(keys, values)
        layer.keys[:, :, : keys.shape[2]] = keys
        layer.values[:, :, : values.shape[2]] = values
        layer.cumulative_length = torch.tensor(past, device=keys.device)
        layers.append(layer)
    return Cache(layers=layers)


def captured(batch: StaticBatch) -> Callable[[], Any]:
    """Return what makes one step of `batch`: a replay of its CUDA graph, on a CPU the step itself.

    Capturing makes no step, the warm-up before it does: the caller counts one.
    """
    if not batch.token.is_cuda:
        batch.step()
        return batch.step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate what they need at their first call
        batch.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # weights that autocast converted outside would be freed after the capture
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    torch.clear_autocast_cache()
    with torch.autocast("cuda", dtype, enabled, cache_enabled=False), torch.cuda.graph(graph):
        batch.step()
    return graph.replay


def decode(batch: StaticBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Extend a batch until every sequence ended, and return its tokens (B, T), lengths (B,) and which had EOS (B,)."""
    tokens, ends, stopped = batch.tokens.clone(), batch.ends.clone(), batch.stopped.clone()
    rows = torch.arange(len(tokens), device=tokens.device)
    longest = int(batch.limits.max())
    count = 1
    replay: Callable[[], Any] | None = None
    while count < longest:
        live = batch.live.nonzero().squeeze(1)  # waits for the device
        if not len(live):
            break
        if len(live) <= len(rows) // 2:
            tokens[rows], ends[rows], stopped[rows] = batch.tokens, batch.ends, batch.stopped
            batch, rows, replay = batch.select(live), rows[live], None
        if replay is None:
            replay = captured(batch)
            count += 1
        for _ in range(min(STEPS, longest - count)):
            replay()
            count += 1
    tokens[rows], ends[rows], stopped[rows] = batch.tokens, batch.ends, batch.stopped
    return tokens, ends, stopped
