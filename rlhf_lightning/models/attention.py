"""Attention of packed completion groups that computes only what the group rule allows.

A dense mask makes the kernel compute every pair of tokens of a row and throw most of them away. Here a row is cut into
its runs: a prompt with its first response is one causal run, every further response attends to the prompt and itself.
The runs of a batch travel with the attention mask, so a decoder needs nothing but an entry in Hugging Face's registry.
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
SHORTEST = 64


@dataclass(frozen=True)
class Run:
    """`size` tokens that follow one another: a prompt, one response, or padding.

    `prompt` is the number of the run that holds the prompt of a response, -1 for prompts and padding; `first` tells the
    response that stands right behind its prompt.
    """

    size: int
    prompt: int = -1
    first: bool = False
    padding: bool = False


def find_runs(group_ids: Tensor, response_ids: Tensor) -> list[Run]:
    """Return the runs of all rows (R, L), one row after the other."""
    found: list[Run] = []
    prompt = -1
    for groups, responses in zip(group_ids.tolist(), response_ids.tolist(), strict=True):
        for (group, response), members in groupby(zip(groups, responses, strict=True)):
            size = sum(1 for _ in members)
            if group < 0:
                found.append(Run(size, padding=True))
            elif response == 0:
                prompt = len(found)
                found.append(Run(size))
            else:
                found.append(Run(size, prompt, first=response == 1))
    return found


def with_runs(attention_mask: Tensor, group_ids: Tensor, response_ids: Tensor, shortest: int = SHORTEST) -> Tensor:
    """Return the mask with its runs, which :func:`group_sdpa` computes instead; to other attention it is the mask.

    Where a response with its share of the prompt has fewer than `shortest` tokens, the whole mask is quicker.
    """
    runs = find_runs(group_ids, response_ids)
    if int((group_ids >= 0).sum()) >= shortest * sum(run.prompt >= 0 for run in runs):
        attention_mask.runs = runs  # type: ignore[attr-defined]
    return attention_mask


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
    """Return attention (R, L, H, D) over the runs of a mask that has them, else what Hugging Face's sdpa returns."""
    runs: list[Run] | None = getattr(attention_mask, "runs", None)
    if runs is None or kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    rows, heads, length, _ = query.shape
    repeats = heads // key.shape[1]
    # one split for all runs: the gradient of a slice would be a tensor of the whole size, once for every run
    sizes = [run.size for run in runs]
    q, k, v = (
        x.transpose(0, 1).flatten(1, 2).split(sizes, 1)
        for x in (query, repeat_kv(key, repeats), repeat_kv(value, repeats))
    )
    attend = partial(scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    found: list[Tensor] = []
    for number, run in enumerate(runs):
        if run.padding:
            found.append(v[number].new_zeros(v[number].shape))
        elif run.prompt < 0:
            continue  # with its first response
        else:
            keys, values = (torch.cat([x[run.prompt], x[number]], 1) for x in (k, v))
            if run.first:
                found.append(
                    attend(torch.cat([q[run.prompt], q[number]], 1)[None], keys[None], values[None], is_causal=True)[0]
                )
            else:
                ahead = keys.shape[1] - run.size
                mask = torch.ones(run.size, keys.shape[1], dtype=torch.bool, device=keys.device).tril(ahead)
                found.append(attend(q[number][None], keys[None], values[None], attn_mask=mask)[0])
    return torch.cat([part.transpose(0, 1) for part in found]).view(rows, length, heads, -1), None


AttentionInterface.register(GROUP_SDPA, group_sdpa)
AttentionMaskInterface.register(GROUP_SDPA, sdpa_mask)
