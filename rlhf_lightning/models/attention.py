"""Attention of packed completion groups that computes only what the group rule allows.

A dense mask makes the kernel compute every pair of tokens of a row and throw most of them away. Here a row is cut into
its runs: a prompt with its first response is one causal run, every further response attends to the prompt and itself.
The runs of a batch travel with the attention mask, so a decoder needs nothing but an entry in Hugging Face's registry.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """Tokens [start, end) of row `row`; they also attend to [prompt, prompt_end), the prompt of their group."""

    row: int
    start: int
    end: int
    prompt: int = 0
    prompt_end: int = 0


def find_runs(group_ids: Tensor, response_ids: Tensor) -> list[list[Run]]:
    """Return the runs of every row in order: prompt and first response as one, then response by response."""
    found = []
    for row, (groups, responses) in enumerate(zip(group_ids.tolist(), response_ids.tolist(), strict=True)):
        runs: list[Run] = []
        start = prompt = prompt_end = 0
        for place in range(1, len(groups) + 1):
            same_group = place < len(groups) and groups[place] == groups[place - 1]
            if same_group and responses[place] == responses[place - 1]:
                continue
            if same_group and responses[place] == 1:  # the prompt ends here, and the run goes on
                prompt, prompt_end = start, place
                continue
            if groups[place - 1] >= 0:
                later = responses[place - 1] > 1
                runs.append(Run(row, start, place, prompt, prompt_end) if later else Run(row, start, place))
            start = place
        found.append(runs)
    return found


def with_runs(attention_mask: Tensor, group_ids: Tensor, response_ids: Tensor) -> Tensor:
    """Return the mask with its runs, which :func:`group_sdpa` computes instead; to other attention it is the mask."""
    attention_mask.runs = find_runs(group_ids, response_ids)  # type: ignore[attr-defined]
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
    rows: list[list[Run]] | None = getattr(attention_mask, "runs", None)
    if rows is None or kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    repeats = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    found = []
    for row, runs in enumerate(rows):
        q, k, v = query[row : row + 1], key[row : row + 1], value[row : row + 1]
        parts = []
        for run in runs:
            here = slice(run.start, run.end)
            if run.prompt_end == run.prompt:
                parts.append(
                    scaled_dot_product_attention(q[:, :, here], k[:, :, here], v[:, :, here], is_causal=True, **options)
                )
                continue
            before = slice(run.prompt, run.prompt_end)
            keys, values = (torch.cat([x[:, :, before], x[:, :, here]], 2) for x in (k, v))
            size = run.end - run.start
            allowed = torch.ones(size, keys.shape[2], dtype=torch.bool, device=q.device).tril(keys.shape[2] - size)
            parts.append(scaled_dot_product_attention(q[:, :, here], keys, values, attn_mask=allowed, **options))
        parts.append(q.new_zeros(1, q.shape[1], q.shape[2] - (runs[-1].end if runs else 0), v.shape[3]))
        found.append(torch.cat(parts, 2))
    return torch.cat(found).transpose(1, 2), None


AttentionInterface.register(GROUP_SDPA, group_sdpa)
AttentionMaskInterface.register(GROUP_SDPA, sdpa_mask)
