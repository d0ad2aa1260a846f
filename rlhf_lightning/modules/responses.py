"""Responses that SFT and DPO show while they train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rlhf_lightning.generation.local import Sampler
from rlhf_lightning.ops.groups import Group


def sampled_responses(lm: nn.Module, data: Any, rows: Sequence[Group], max_new_tokens: int) -> list[dict[str, Any]]:
    """Return a sampled response to the prompt of each row, as text.

    Raises:
        UserError: the model cannot be sampled from.
    """
    if not rows:
        return []
    sampler = Sampler(lm, data.template.eos_ids, max_new_tokens)
    with torch.random.fork_rng():
        samples = sampler([list(row.prompt) for row in rows], 1, ("samples",))
    return [
        {"prompt": data.tokenizer.decode(row.prompt), "response": data.template.decode(ids), "finished": finished}
        for row, ids, finished in zip(rows, samples.responses, samples.finished, strict=True)
    ]
