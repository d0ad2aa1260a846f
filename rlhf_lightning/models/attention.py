"""Attention of packed completion groups that computes only what the group rule allows.

A dense mask makes the kernel compute every pair of tokens of a row and throw most of them away. Here the runs of a
batch (:mod:`rlhf_lightning.ops.runs`) are passed in place of the attention mask, so a decoder needs only an entry in
Hugging Face's attention registry. On an accelerator in half precision one call of varlen flash attention computes all
of them, else one call of scaled dot product attention each.
"""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_lightning.ops.runs import Runs

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None  # pyright: ignore[reportAssignmentType]

GROUP_SDPA = "group_sdpa"
HALF = (torch.bfloat16, torch.float16)


def runs_mask(runs: Runs, device: torch.device) -> Tensor:
    """Return an empty attention mask that carries `runs`; attention that ignores them fails on its shape."""
    mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
    mask.runs = runs  # type: ignore[attr-defined]
    return mask


def group_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return attention (1, L, H, D) over the runs of a mask that has them, else what Hugging Face's sdpa returns."""
    runs: Runs | None = getattr(attention_mask, "runs", None)
    if runs is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if extra := query.shape[2] - len(runs.real):  # columns that compiled layers are given (models/layers.py)
        query, key, value = (x[:, :, :-extra] for x in (query, key, value))
        output, _ = group_sdpa(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return pad(output, (0, 0, 0, 0, 0, extra)), None
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise NotImplementedError("soft caps and position biases are not computed by runs")
    if query.is_cuda and value.dtype in HALF and not dropout:
        q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
        return varlen(q, k, v, runs, scaling)[None], None
    dtype, repeats = value.dtype, query.shape[1] // key.shape[1]
    # the CPU kernel is slower in half precision, above all backward; under autocast only the values are in it
    query, key, value = (x if x.dtype == torch.float64 else x.float() for x in (query, key, value))
    # one split for all runs: the gradient of a slice would be a tensor of the whole size, once for every run
    sizes = [run.size for run in runs.runs]
    q, k, v = (x[0].split(sizes, 1) for x in (query, repeat_kv(key, repeats), repeat_kv(value, repeats)))
    attend = partial(scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    outputs: list[Tensor] = []
    with torch.autocast(query.device.type, enabled=False):
        for number, run in enumerate(runs.runs):
            if run.prompt < 0:
                continue  # computed with its first response
            keys, values = (torch.cat([x[run.prompt], x[number]], 1) for x in (k, v))
            if run.first:
                queries = torch.cat([q[run.prompt], q[number]], 1)
                outputs.append(attend(queries[None], keys[None], values[None], is_causal=True)[0])
            else:
                ahead = keys.shape[1] - run.size
                mask = torch.ones(run.size, keys.shape[1], dtype=torch.bool, device=keys.device).tril(ahead)
                outputs.append(attend(q[number][None], keys[None], values[None], attn_mask=mask)[0])
    return torch.cat([part.transpose(0, 1) for part in outputs])[None].to(dtype), None


def varlen(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scaling: float | None) -> Tensor:
    """Return causal attention (T, H, D) of queries (T, H, D) to keys and values (T, Hkv, D) over `runs`."""
    if varlen_attn is None:
        raise NotImplementedError("varlen attention needs torch 2.10 or newer")
    repeats, options = query.shape[1] // key.shape[1], {}
    if runs.shared:  # not by [], whose gradient sorts the indices
        key, value = (x.index_select(0, runs.key_tokens) for x in (key, value))
    if "enable_gqa" in signature(varlen_attn).parameters:
        options["enable_gqa"] = repeats > 1
    elif repeats > 1:  # before torch 2.12
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    causal = (-1, 0)  # aligned to the last key
    attend: Any = varlen_attn
    return attend(
        query, key, value, runs.query_ends, runs.key_ends, *runs.longest, scale=scaling, window_size=causal, **options
    )


AttentionInterface.register(GROUP_SDPA, group_sdpa)
AttentionMaskInterface.register(GROUP_SDPA, sdpa_mask)
