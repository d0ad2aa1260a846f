"""Generation in this process: shared prefill, finished sequences leave the batch, draws independent of batching."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from rlhf_lightning.distributed import is_lost_peer
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.cache import GrowingLayer, Reread, growing_cache, select_rows
from rlhf_lightning.generation.engine import Engine, Generations
from rlhf_lightning.generation.static import BLOCK, StaticBatch, captured, decode, static_cache
from rlhf_lightning.models.attention import HALF
from rlhf_lightning.models.completion import computes_in, unwrap
from rlhf_lightning.models.sharding import call, is_sharded, max_over_ranks
from rlhf_lightning.ops.seeding import uniform

log = logging.getLogger(__name__)

# whether decoding equals a full forward pass, and whether it does so with static shapes
_CACHED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_STATIC: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass
class _Live:
    """The sequences still being extended, one row each."""

    slot: Tensor  # (B,) place in the result
    token: Tensor  # (B,) last sampled token
    length: Tensor  # (B,) position of that token
    mask: Tensor  # (B, past) which cached positions are real


class LocalEngine(Engine):
    """Samples responses from a causal language model in this process; nothing is kept between two calls.

    Every token of sample k of prompt i is drawn by inverting the distribution function at a uniform number that
    depends on `(seed_parts, id of i, k, t)` only, so batch size, order and early stops never change a sample.

    Args:
        batch_tokens: most prompt plus response tokens in a decoding batch; changes memory, not results.
        top_k, top_p: restrict the distribution (0 and 1.0 leave it whole). PPO needs it whole.
        static: decode with static shapes (:mod:`rlhf_lightning.generation.static`); None does on an accelerator.
    """

    def __init__(
        self, batch_tokens: int = 32_768, top_k: int = 0, top_p: float = 1.0, static: bool | None = None
    ) -> None:
        self.batch_tokens, self.top_k, self.top_p, self.static = batch_tokens, top_k, top_p, static
        self.use_static = False
        self.close()

    def start(self, lm: nn.Module, eos_ids: Iterable[int]) -> None:
        """Take a Hugging Face causal LM, or a peft model around one, and the tokens that end a response.

        An EOS token is part of the response it ends.
        """
        self.lm, self.eos = lm, torch.tensor(sorted(set(eos_ids)))

    def close(self) -> None:
        """Release the model."""
        self.lm: Any = None
        self.eos = torch.tensor([], dtype=torch.long)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int = 1,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed_parts: Sequence[int | str] = (0,),
        ids: Sequence[int] | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> Generations:
        """Return `num_generations` responses to each prompt, see :meth:`Engine.generate`."""
        ids = list(range(len(prompts))) if ids is None else ids
        n = num_generations
        responses: list[list[int]] = [[] for _ in range(len(prompts) * n)]
        finished = [False] * len(responses)
        training = self.lm.training
        self.lm.eval()
        try:
            self._choose_cache()
            self.use_static = self._choose_static()
            batches = self._batches(prompts, n, max_new_tokens)
            for number in range(max_over_ranks(self.lm, len(batches))):
                if number >= len(batches):  # other ranks have one more batch, and forward passes are collective
                    self._match_collectives()
                    continue
                batch = batches[number]
                uniforms = torch.stack(
                    [uniform(max_new_tokens, *seed_parts, ids[p], k) for p in batch for k in range(n)]
                )
                self._decode([prompts[p] for p in batch], batch, n, uniforms, temperature, responses, finished)
                if progress:
                    progress(len(batch))
        finally:
            self.lm.train(training)
        return Generations(responses, finished)

    def _choose_cache(self) -> None:
        """Compare decoding with a full forward pass; a model whose cache differs reads all tokens at every step.

        Raises:
            UserError: the model differs even then.
        """
        if self.lm in _CACHED:
            return
        reason = ""
        for cached in (True, False):
            _CACHED[self.lm] = cached
            try:
                gap = self._decoding_gap()
                problem = f"log-probabilities are off by {gap:.2g}"
            except (IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError) or is_lost_peer(error):
                    raise
                gap, problem = math.inf, f"{type(error).__name__}: {str(error)[:120]}"
            inner = unwrap(self.lm)
            if gap <= (0.5 if computes_in(self.lm) in HALF else 1e-2):
                if not cached:
                    log.warning("%s is sampled without a cache, which is slow: %s", type(inner).__name__, reason)
                return
            reason = reason or problem
        del _CACHED[self.lm]
        raise UserError(f"{type(inner).__name__} cannot be sampled from ({reason})")

    def _choose_static(self) -> bool:
        """Return whether static shapes are asked for, the model's cache allows them, and they change nothing."""
        wanted = unwrap(self.lm).device.type == "cuda" if self.static is None else self.static
        if not wanted or not _CACHED[self.lm] or is_sharded(self.lm):
            return False
        if self.lm not in _STATIC:
            try:
                gap = self._static_gap()
                problem = f"log-probabilities are off by {gap:.2g}"
            except (IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                gap, problem = math.inf, f"{type(error).__name__}: {str(error)[:120]}"
            _STATIC[self.lm] = gap <= (0.5 if computes_in(self.lm) in HALF else 1e-2)
            if not _STATIC[self.lm]:
                name = type(unwrap(self.lm)).__name__
                log.warning("%s is sampled without static shapes, which is slow: %s", name, problem)
        return _STATIC[self.lm]

    def _static_gap(self) -> float:
        """Return the largest difference of log-probabilities after prefill, selecting and two steps, one replayed."""
        inner = unwrap(self.lm)
        vocab = inner.config.get_text_config().vocab_size
        prompts = [[(5 * i + 3) % vocab for i in range(4)], [(3 * i + 1) % vocab for i in range(2)]]
        logits, cache, live = self._prefill(prompts, 2, torch.arange(4), inner.device)
        seen: list[Tensor] = []

        def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
            seen[:] = [logits]
            return logits.argmax(-1)

        draws, limits = torch.zeros(4, 4, device=inner.device), torch.full((4,), 4, device=inner.device)
        none = torch.tensor([], dtype=torch.long, device=inner.device)
        batch = self._static_batch(logits, cache, live, draws, limits, none, sample)
        rows = [3, 0, 2]
        batch = batch.select(torch.tensor(rows, device=inner.device))
        captured(batch)()
        gap = 0.0
        for row, place in enumerate(rows):
            ids = torch.tensor([[*prompts[place // 2], *batch.tokens[row, :2].tolist()]], device=inner.device)
            expected = call(self.lm, input_ids=ids, use_cache=False).logits[0, -1].float().log_softmax(-1)
            gap = max(gap, (seen[0][row].float().log_softmax(-1) - expected).abs().max().item())
        return gap

    def _static_batch(
        self,
        logits: Tensor,
        cache: Any,
        live: _Live,
        uniforms: Tensor,
        limits: Tensor,
        eos: Tensor,
        sample: Callable[[Tensor, Tensor], Tensor],
    ) -> StaticBatch:
        """Return the sequences of a prefill with room for all tokens to come."""
        if any(type(layer) is not GrowingLayer for layer in cache.layers):
            raise ValueError("its cache has other layers than keys and values of all tokens")
        past = live.mask.shape[1]
        capacity = -(-(past + uniforms.shape[1]) // BLOCK) * BLOCK
        mask = pad(live.mask, (0, capacity - past))
        buffers = static_cache([(layer.keys, layer.values) for layer in cache.layers], past, capacity)

        def forward(token: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
            inputs = {"input_ids": token, "attention_mask": mask, "position_ids": positions}
            return self.lm(**inputs, cache=cache, use_cache=True).logits[:, -1]

        first = sample(logits, uniforms[:, 0])
        return StaticBatch(forward, sample, first, live.length.clone(), mask, buffers, past, uniforms, limits, eos)

    def _decoding_gap(self) -> float:
        """Return the largest difference of log-probabilities after prefill, repeating, selecting and two steps."""
        inner = unwrap(self.lm)
        vocab = inner.config.get_text_config().vocab_size
        prompts = [[(5 * i + 3) % vocab for i in range(4)], [(3 * i + 1) % vocab for i in range(2)]]
        _, cache, live = self._prefill(prompts, 2, torch.arange(4), inner.device)
        texts = [list(prompt) for prompt in prompts for _ in range(2)]
        gap = 0.0
        for step, rows in enumerate(([0, 1, 2, 3], [3, 0])):
            live = self._select(cache, live, torch.tensor(rows, device=inner.device))
            texts = [texts[row] for row in rows]
            following = [(7 + 4 * step + 3 * row) % vocab for row in range(len(rows))]
            live.token = torch.tensor(following, device=inner.device)
            logprobs = self._step(cache, live).float().log_softmax(-1)
            for row, token in enumerate(following):
                texts[row] = [*texts[row], token]
                ids = torch.tensor([texts[row]], device=inner.device)
                expected = call(self.lm, input_ids=ids, use_cache=False).logits[0, -1].float().log_softmax(-1)
                gap = max(gap, (logprobs[row] - expected).abs().max().item())
        return gap

    def _batches(self, prompts: Sequence[Sequence[int]], n: int, max_new_tokens: int) -> list[list[int]]:
        """Group prompts of similar length so that a decoding batch stays within its token budget."""
        order = sorted(range(len(prompts)), key=lambda p: (-len(prompts[p]), p))
        batches: list[list[int]] = []
        for p in order:
            longest = len(prompts[batches[-1][0]]) if batches else 0
            if batches and (len(batches[-1]) + 1) * n * (longest + max_new_tokens) <= self.batch_tokens:
                batches[-1].append(p)
            else:
                batches.append([p])
        return batches

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        places: Sequence[int],
        n: int,
        uniforms: Tensor,
        temperature: float,
        responses: list[list[int]],
        finished: list[bool],
    ) -> None:
        device, max_new_tokens = unwrap(self.lm).device, uniforms.shape[1]
        eos, uniforms = self.eos.to(device), uniforms.to(device)
        slots = torch.tensor([p * n + k for p in places for k in range(n)])
        # room for the longest response every prompt may have within the context
        context = getattr(unwrap(self.lm).config.get_text_config(), "max_position_embeddings", None)
        limits = torch.tensor(
            [min(max_new_tokens, (context or 10**9) - len(p)) for p in prompts for _ in range(n)],
            device=device,
        ).clamp_min(1)
        logits, cache, live = self._prefill(prompts, n, slots, device)

        def sample(logits: Tensor, draws: Tensor) -> Tensor:
            return self._sample(logits, draws, temperature)

        if self.use_static:
            batch = self._static_batch(logits, cache, live, uniforms, limits, eos, sample)
            tokens, ends, ended = decode(batch)
        else:
            tokens, ends, ended = self._decode_plain(logits, cache, live, uniforms, limits, eos, sample)
        found = zip(slots.tolist(), tokens.tolist(), ends.tolist(), ended.tolist(), strict=True)
        for slot, ids, end, has_eos in found:
            responses[slot], finished[slot] = ids[:end], has_eos

    def _decode_plain(
        self,
        logits: Tensor,
        cache: Any,
        live: _Live,
        uniforms: Tensor,
        limits: Tensor,
        eos: Tensor,
        sample: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Extend the sequences token by token; those that ended leave the batch at once."""
        slots, max_new_tokens, device = live.slot, uniforms.shape[1], uniforms.device
        tokens = torch.zeros((len(slots), max_new_tokens), dtype=torch.long, device=device)
        ends = torch.zeros(len(slots), dtype=torch.long, device=device)
        ended = torch.zeros(len(slots), dtype=torch.bool, device=device)
        rows = torch.arange(len(slots), device=device)  # live rows, as places in `tokens`
        for t in range(max_new_tokens):
            live.token = sample(logits, uniforms[rows, t])
            tokens[rows, t] = live.token
            ends[rows] = t + 1
            stop = torch.isin(live.token, eos)
            ended[rows] = stop
            keep = ~stop & (t + 1 < limits[rows])
            if not keep.any():
                break
            max_over_ranks(self.lm, 1)
            if not keep.all():
                live_rows = keep.nonzero().squeeze(1)
                rows = rows[live_rows]
                live = self._select(cache, live, live_rows)
            logits = self._step(cache, live)
        while max_over_ranks(self.lm, 0):
            self._dummy_forward()
        return tokens, ends, ended

    def _match_collectives(self) -> None:
        """Make dummy forward passes for a batch that only other ranks have."""
        self._dummy_forward()
        while max_over_ranks(self.lm, 0):
            self._dummy_forward()

    def _dummy_forward(self) -> None:
        """Make the smallest forward pass: those of a sharded model are collective."""
        call(self.lm, input_ids=torch.zeros((1, 1), dtype=torch.long, device=unwrap(self.lm).device), use_cache=False)

    def _prefill(
        self, prompts: Sequence[Sequence[int]], n: int, slots: Tensor, device: torch.device
    ) -> tuple[Tensor, DynamicCache | Reread, _Live]:
        """Read every prompt once, left-padded, and repeat its cache for the n samples."""
        width = max(len(p) for p in prompts)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.arange(width, device=device)[None, :] >= (width - lengths)[:, None]
        repeat = torch.arange(len(prompts), device=device).repeat_interleave(n)
        live = _Live(slots, ids[repeat, -1], (lengths - 1)[repeat], mask[repeat])
        if not _CACHED[self.lm]:
            reread = Reread(prompts, device)
            logits = reread.logits(self.lm)[repeat]
            select_rows(reread, repeat)
            return logits, reread, live
        cache = growing_cache(unwrap(self.lm).config.get_text_config())
        output = call(
            self.lm,
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(1) - 1).clamp_min(0),
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if n > 1:
            select_rows(cache, repeat)
        return output.logits[:, -1][repeat], cache, live

    def _select(self, cache: DynamicCache | Reread, live: _Live, rows: Tensor) -> _Live:
        """Return the live sequences `rows`, in that order, and keep only theirs in the cache."""
        select_rows(cache, rows)
        return _Live(live.slot, live.token[rows], live.length[rows], live.mask[rows])

    def _step(self, cache: DynamicCache | Reread, live: _Live) -> Tensor:
        """Return the logits (B, V) after the last sampled token of every live row."""
        if isinstance(cache, Reread):
            cache.append(live.token)
            return cache.logits(self.lm)
        live.mask = torch.cat([live.mask, live.mask.new_ones(len(live.mask), 1)], dim=1)
        live.length = live.length + 1
        output = call(
            self.lm,
            input_ids=live.token[:, None],
            attention_mask=live.mask.long(),
            position_ids=live.length[:, None],
            cache=cache,
            use_cache=True,
        )
        return output.logits[:, -1]

    def _sample(self, logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
        """Return one token (B,) from each row of logits (B, V)."""
        if temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / temperature
        if self.top_k:
            smallest = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, float("-inf"))
        if self.top_p < 1:
            ordered, places = logits.softmax(-1).sort(dim=-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= self.top_p
            logits = logits.masked_fill(outside.scatter(1, places, outside), float("-inf"))
        return invert(torch.exp(logits - logits.amax(-1, keepdim=True)), uniforms)


def invert(weights: Tensor, uniforms: Tensor, block: int = 256) -> Tensor:
    """Return for each row the first place where the cumulative share of `weights` (B, V) exceeds its uniform number.

    Only sums of blocks are cumulated over the vocabulary, and then the weights of one block; a place of weight 0 is
    never taken.
    """
    blocks = pad(weights, (0, -weights.shape[-1] % block)).unflatten(-1, (-1, block))
    sums = blocks.sum(-1, dtype=torch.float64)
    ends = sums.cumsum(-1)
    target = uniforms.double()[:, None] * ends[:, -1:]
    block_index = torch.searchsorted(ends, target, right=True).clamp_max(ends.shape[-1] - 1)
    inside = blocks.gather(1, block_index[..., None].expand(-1, -1, block)).squeeze(1).double().cumsum(-1)
    rest = (target - (ends - sums).gather(1, block_index)).minimum(inside[:, -1:].nextafter(inside.new_zeros(())))
    places = (block_index * block + torch.searchsorted(inside, rest, right=True)).squeeze(1)
    return places.clamp_max(weights.shape[-1] - 1)  # NaN weights are reported with the loss
