"""Sampled responses that SFT and DPO write during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rlhf_lightning.generation.answers import answer, start
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.ops.groups import Group


def sampled_responses(
    engine: Engine, lm: nn.Module, data: Any, rows: Sequence[Group], max_new_tokens: int
) -> list[dict[str, Any]]:
    """Return a sampled response to the prompt of each row, as text.

    Raises:
        UserError: the model cannot be sampled from.
    """
    if not rows:
        return []
    start(engine, lm, data.template)
    try:
        with torch.random.fork_rng():
            answers = answer(engine, data.template, rows, max_new_tokens=max_new_tokens, seed_parts=("samples",))
    finally:
        engine.close()
    prompts = [data.tokenizer.decode(row.prompt) for row in rows]
    columns = zip(prompts, answers.texts, answers.finished, strict=True)
    return [{"prompt": p, "response": text, "finished": finished} for p, text, finished in columns]
