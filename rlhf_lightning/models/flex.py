"""FlexAttention over packed completion groups: what varlen flash attention does not compute, on an accelerator.

It takes float32, soft caps, attention sinks and any head size, and skips the blocks of 128 x 128 tokens that the group
rule forbids. It has no dropout, and PyTorch gives it no backward pass on a CPU (He et al. 2024, arXiv 2412.05496).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from transformers.integrations.sdpa_attention import repeat_kv

from rlhf_lightning.ops.runs import Run, Runs

BLOCK = 128
COMPILATIONS = 64


def padded_length(tokens: int) -> int:
    """Return the number of tokens of a row that FlexAttention reads: the next multiple of 128."""
    return -(-tokens // BLOCK) * BLOCK


@torch.inference_mode(False)  # what is kept for the backward pass must not be made in inference mode
def block_mask(runs: Runs, window: int | None = None, device: torch.device | str = "cpu") -> BlockMask:
    """Return the mask of the T tokens of `runs`, padded to a multiple of 128, with a sliding window or without one.

    Which blocks are empty, full or neither follows from the runs, so it is computed on the host and copied without
    waiting for the device. :func:`torch.nn.attention.flex_attention.create_block_mask` would evaluate all T x T pairs.
    """
    tokens = sum(run.size for run in runs.runs)
    # padding attends to itself, as a prompt without responses
    padding = padded_length(tokens) - tokens
    parts = [*runs.runs, Run(padding)] if padding else list(runs.runs)
    group, response, position = (_copied(column, device) for column in _columns(parts))
    # the first position that is visible, as a tensor: a window that is a number would be compiled into the kernel
    floor = position - (window - 1 if window is not None else padded_length(tokens))

    def allowed(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        visible = (response[k] == 0) | (response[q] == response[k])
        return (group[q] == group[k]) & (q >= k) & visible & (position[k] >= floor[q])

    some, full = _blocks(parts, window)
    ordered = [_copied(part, device) for blocks in (some & ~full, full) for part in _ordered(blocks)]
    return BlockMask.from_kv_blocks(*ordered, BLOCK_SIZE=BLOCK, mask_mod=allowed)


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scaling: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return attention (1, L, H, D) of queries (1, H, L, D) to keys and values (1, Hkv, L, D) under a block mask.

    Scores become c tanh(score / c) with a soft cap c. A sink (H,) is one more score of every query without a value:
    with the log-sum-exp of the others it scales the output by sigmoid(lse - sink).
    """
    heads, repeats = query.shape[1], query.shape[1] // key.shape[1]
    if heads & (heads - 1):  # the kernel takes shared keys of 2^n heads only
        key, value, repeats = repeat_kv(key, repeats), repeat_kv(value, repeats), 1
    for x in (query, key, value):
        torch._dynamo.mark_static(x, 1)  # a model with other heads would make their number vary, which fails to compile
    options: dict[str, Any] = {"block_mask": mask, "scale": scaling, "enable_gqa": repeats > 1}
    if softcap is not None:
        options["score_mod"] = _capped(softcap, query.device)
    if sinks is None:
        return compiled()(query, key, value, **options).transpose(1, 2)
    output, aux = compiled()(query, key, value, return_aux=AuxRequest(lse=True), **options)
    kept = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[None, :, None])
    return (output * kept.to(output.dtype)[..., None]).transpose(1, 2)


@cache
def compiled() -> Any:
    """Return compiled FlexAttention, one for all lengths; each number of heads, precision and mode is compiled.

    Without `fullgraph` a failure to compile would run the operation that computes all scores, with a warning only.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILATIONS)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@cache
def _capped(softcap: float, device: torch.device) -> Any:
    cap = torch.full((), softcap, device=device)  # a number would be one that varies, for which no gradient is compiled

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def _copied(array: np.ndarray, device: torch.device | str) -> Tensor:
    tensor = torch.from_numpy(array.astype(np.int32))
    if torch.device(device).type == "cuda":  # from pageable memory, the copy would wait for the device
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _columns(parts: list[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the group, the response (0 for prompts) and the position of every token."""
    sizes = [run.size for run in parts]
    numbers = np.arange(len(parts))
    prompts = np.array([run.prompt for run in parts])
    group = np.repeat(np.where(prompts < 0, numbers, prompts), sizes)
    response = np.repeat(np.where(prompts < 0, 0, numbers), sizes)
    return group, response, np.concatenate([np.arange(run.size) + _offset(parts, run) for run in parts])


def _offset(parts: list[Run], run: Run) -> int:
    return 0 if run.prompt < 0 else parts[run.prompt].size


def _blocks(parts: list[Run], window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return which of the (n, n) blocks of queries and keys hold an allowed pair, and which hold no other."""
    starts = np.cumsum([0, *(run.size for run in parts)])
    count = starts[-1] // BLOCK
    some, pairs = np.zeros((count, count), bool), np.zeros((count, count), int)

    def cut(number: int) -> tuple[slice, np.ndarray, np.ndarray]:
        """Return the blocks of a run, and the first and last position of it in each."""
        begin, end = starts[number], starts[number + 1]
        blocks = np.arange(begin // BLOCK, (end - 1) // BLOCK + 1)
        shift = _offset(parts, parts[number]) - begin
        first, last = np.maximum(blocks * BLOCK, begin), np.minimum((blocks + 1) * BLOCK, end) - 1
        return slice(blocks[0], blocks[-1] + 1), first + shift, last + shift

    for number, run in enumerate(parts):
        rows, first, last = cut(number)
        for keys in (number, run.prompt):
            if keys < 0:
                continue
            columns, key_first, key_last = cut(keys)
            # position of the query minus position of the key: least and most in a block
            least, most = first[:, None] - key_last, last[:, None] - key_first
            inside = most >= 0, least >= 0
            if window is not None:
                inside = inside[0] & (least < window), inside[1] & (most < window)
            some[rows, columns] |= inside[0]
            sizes = (last - first + 1)[:, None] * (key_last - key_first + 1)
            pairs[rows, columns] += inside[1] * sizes
    return some, pairs == BLOCK * BLOCK


def _ordered(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for every row how many blocks it has, and their columns first; (1, 1, n) and (1, 1, n, n)."""
    return blocks.sum(1)[None, None], np.argsort(~blocks, axis=1, kind="stable")[None, None]
