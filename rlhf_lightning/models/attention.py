"""Attention of packed completion groups that computes only what the group rule allows.

A dense mask makes the kernel compute every pair of tokens of a row and throw most of them away. Here what a batch
allows is passed in place of the attention mask, so a decoder needs only an entry in Hugging Face's attention registry.
There are four paths, and a sliding window (`sliding_window` of a layer) is a window of positions in each:

* `varlen`: one call of varlen flash attention over all runs (:mod:`rlhf_lightning.ops.runs`), half precision on CUDA;
* `flex`: FlexAttention with a block mask (:mod:`rlhf_lightning.models.flex`), everything else on CUDA;
* `runs`: one call of scaled dot product attention per response, on a CPU;
* `dense`: the dense mask, for any device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_lightning.models.flex import block_mask, flex
from rlhf_lightning.ops.masking import group_attention_mask
from rlhf_lightning.ops.runs import Runs

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None  # pyright: ignore[reportAssignmentType]

# not "sdpa" in any part: Hugging Face refuses such a name for architectures with soft caps or sinks
GROUP_SDPA = "group_attention"
HALF = (torch.bfloat16, torch.float16)
VARLEN_HEAD = 256  # largest head of flash attention
Path = Literal["varlen", "flex", "runs", "dense"]
PATHS: dict[Path, str] = {
    "varlen": "one call of varlen flash attention per layer",
    "flex": "FlexAttention with a block mask",
    "runs": "one call of scaled dot product attention per response",
    "dense": "a dense attention mask",
}


@dataclass(frozen=True)
class Allowed:
    """Which tokens of a packed batch attend to which, on one path.

    `window` is that of the sliding-window layers, None where it restricts nothing; `masks` are dense masks or block
    masks by window.
    """

    path: Path
    window: int | None
    runs: Runs | None = None
    masks: dict[int | None, Any] = field(default_factory=dict)


def window_of(config: Any) -> int | None:
    """Return the tokens that sliding-window attention sees, the query's own included; None without such layers."""
    window, layers = getattr(config, "sliding_window", None), getattr(config, "layer_types", None) or []
    if layers:
        return window if any("sliding" in str(kind) for kind in layers) else None
    return window if getattr(config, "use_sliding_window", True) else None


def possible_paths(config: Any, device: str, dtype: torch.dtype) -> list[Path]:
    """Return the paths for a decoder on a device type, computing in `dtype`, the fastest first, `dense` last."""
    if device == "cpu":
        return ["runs", "dense"]
    dropout = any("att" in k and ("dropout" in k or k.endswith("pdrop")) and v for k, v in vars(config).items())
    if device != "cuda" or dropout:  # neither kernel has dropout
        return ["dense"]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fits = dtype in HALF and head <= VARLEN_HEAD and not getattr(config, "attn_logit_softcapping", None)
    return ["varlen", "flex", "dense"] if fits and varlen_attn is not None else ["flex", "dense"]


def runs_mask(runs: Runs, device: torch.device, path: Path = "runs", window: int | None = None) -> Tensor:
    """Return an empty attention mask that carries `runs`; attention that ignores them fails on its shape."""
    window = runs.within(window)
    if path == "flex":
        for each in {None, window} - runs.masks.keys():
            runs.masks[each] = block_mask(runs, each, device)
    mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
    mask.allowed = Allowed(path, window, runs, runs.masks)  # type: ignore[attr-defined]
    return mask


def dense_mask(group_ids: Tensor, response_ids: Tensor, position_ids: Tensor, window: int | None = None) -> Tensor:
    """Return the dense mask (R, 1, L, L) of full attention, which carries that of sliding-window layers."""
    mask = group_attention_mask(group_ids, response_ids)
    if window is not None:
        masks = {None: mask, window: group_attention_mask(group_ids, response_ids, position_ids, window)}
        mask = mask.view_as(mask)  # not itself: it would hold itself, and its memory, until the next collection
        mask.allowed = Allowed("dense", window, masks=masks)  # type: ignore[attr-defined]
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
    """Return attention (R, L, H, D) over what the mask carries, else what Hugging Face's sdpa or eager return.

    Raises:
        NotImplementedError: the path does not compute what the layer asks for; the probe of a model then takes another.
    """
    allowed: Allowed | None = getattr(attention_mask, "allowed", None)
    softcap, sinks, window = kwargs.get("softcap"), kwargs.get("s_aux"), None
    plain = softcap is None and sinks is None
    if allowed is not None and kwargs.get("sliding_window") is not None:
        window = allowed.window
    if allowed is None or allowed.path == "dense":
        mask = attention_mask if allowed is None else allowed.masks[window]
        if plain:
            return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
        key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
        causal = mask is None and query.shape[2] > 1
        output = explicit(query, key, value, mask, dropout, causal, scaling, softcap, sinks)
        return output.transpose(1, 2).contiguous(), None
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("position biases are computed with padded rows only")
    runs = cast(Runs, allowed.runs)
    extra = query.shape[2] - len(runs.real)
    if extra and allowed.path != "flex":  # columns that compiled layers are given (models/layers.py)
        query, key, value = (x[:, :, :-extra] for x in (query, key, value))
        output, _ = group_sdpa(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return pad(output, (0, 0, 0, 0, 0, extra)), None
    if allowed.path == "runs":
        return by_runs(query, key, value, runs, window, dropout, scaling, softcap, sinks), None
    if dropout:
        raise NotImplementedError(f"{allowed.path} attention has no dropout")
    if allowed.path == "flex":
        query, key = query.to(value.dtype), key.to(value.dtype)
        return flex(query, key, value, allowed.masks[window], scaling, softcap, sinks), None
    if not plain:
        raise NotImplementedError("varlen attention has no soft caps and no sinks")
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    return varlen(q, k, v, runs, scaling, window)[None], None


def by_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Runs,
    window: int | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return attention (1, T, H, D) of queries (1, H, T, D) to keys and values (1, Hkv, T, D), response by response."""
    dtype, repeats = value.dtype, query.shape[1] // key.shape[1]
    # the CPU kernel is slower in half precision, above all backward; under autocast only the values are in it
    query, key, value = (x if x.dtype == torch.float64 else x.float() for x in (query, key, value))
    # one split for all runs: the gradient of a slice would be a tensor of the whole size, once for every run
    sizes = [run.size for run in runs.runs]
    q, k, v = (x[0].split(sizes, 1) for x in (query, repeat_kv(key, repeats), repeat_kv(value, repeats)))
    if softcap is None and sinks is None:
        attend: Any = partial(scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    else:
        attend = partial(explicit, dropout_p=dropout, scale=scaling, softcap=softcap, sinks=sinks)
    outputs: list[Tensor] = []
    with torch.autocast(query.device.type, enabled=False):
        for number, run in enumerate(runs.runs):
            if run.prompt < 0:
                continue  # computed with its first response
            keys, values = (torch.cat([x[run.prompt], x[number]], 1) for x in (k, v))
            queries = torch.cat([q[run.prompt], q[number]], 1) if run.first else q[number]
            count, length = queries.shape[1], keys.shape[1]
            if run.first and (window is None or length <= window):
                outputs.append(attend(queries[None], keys[None], values[None], is_causal=True)[0])
            else:
                mask = torch.ones(count, length, dtype=torch.bool, device=keys.device).tril(length - count)
                if window is not None:  # a query attends to `window` keys, the last of them its own
                    mask = mask.triu(length - count - window + 1)
                outputs.append(attend(queries[None], keys[None], values[None], attn_mask=mask)[0])
    return torch.cat([part.transpose(0, 1) for part in outputs])[None].to(dtype)


def explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return attention (R, H, L, D) with a soft cap on the scores and a sink (H,), operation by operation.

    A score s becomes c tanh(s / c) (Gemma 2, arXiv 2408.00118); a sink is one more score without a value (gpt-oss,
    arXiv 2508.10925).
    """
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:  # finite, so that a row of padding has no NaN
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    shares = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))[..., : key.shape[-2]]
    return drop(shares.to(value.dtype), dropout_p) @ value


def varlen(
    query: Tensor, key: Tensor, value: Tensor, runs: Runs, scaling: float | None, window: int | None = None
) -> Tensor:
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
    # keys to the left of a query and to its right; aligned to the last key, so distances are those of positions
    sides = (-1 if window is None else window - 1, 0)
    attend: Any = varlen_attn
    return attend(
        query, key, value, runs.query_ends, runs.key_ends, *runs.longest, scale=scaling, window_size=sides, **options
    )


AttentionInterface.register(GROUP_SDPA, group_sdpa)
AttentionMaskInterface.register(GROUP_SDPA, sdpa_mask)
