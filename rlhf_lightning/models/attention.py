"""Attention of packed completion groups that computes only what the group rule allows.

A dense mask makes the kernel compute every pair of tokens of a row and throw most of them away. Here the tokens of a
batch, without padding, are one row that is cut into its runs: a prompt with its first response is one causal run, every
further response attends to the prompt and itself. The runs are passed in place of the attention mask, so a decoder
needs only an entry in Hugging Face's attention registry.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUP_SDPA = "group_sdpa"


@dataclass(frozen=True)
class Run:
    """`size` tokens that follow one another: a prompt or one response.

    `prompt` is the number of the run that holds the prompt of a response, -1 for prompts; `first` marks the response
    that directly follows its prompt.
    """

    size: int
    prompt: int = -1
    first: bool = False


def find_runs(group_ids: Tensor, response_ids: Tensor) -> list[Run]:
    """Return the runs of all rows (R, L), one row after the other, without padding."""
    runs: list[Run] = []
    prompt = -1
    for groups, responses in zip(group_ids.tolist(), response_ids.tolist(), strict=True):
        for (group, response), members in groupby(zip(groups, responses, strict=True)):
            size = sum(1 for _ in members)
            if group < 0:
                continue
            if response == 0:
                prompt = len(runs)
            runs.append(Run(size) if response == 0 else Run(size, prompt, first=response == 1))
    return runs


def runs_mask(runs: list[Run], device: torch.device) -> Tensor:
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
    runs: list[Run] | None = getattr(attention_mask, "runs", None)
    if runs is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        raise NotImplementedError("soft caps and position biases are not computed by runs")
    dtype, repeats = value.dtype, query.shape[1] // key.shape[1]
    # the CPU kernel is slower in half precision, above all backward; under autocast only the values are in it
    query, key, value = (x if x.dtype == torch.float64 else x.float() for x in (query, key, value))
    # one split for all runs: the gradient of a slice would be a tensor of the whole size, once for every run
    sizes = [run.size for run in runs]
    q, k, v = (x[0].split(sizes, 1) for x in (query, repeat_kv(key, repeats), repeat_kv(value, repeats)))
    attend = partial(scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    outputs: list[Tensor] = []
    with torch.autocast(query.device.type, enabled=False):
        for number, run in enumerate(runs):
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


AttentionInterface.register(GROUP_SDPA, group_sdpa)
AttentionMaskInterface.register(GROUP_SDPA, sdpa_mask)
