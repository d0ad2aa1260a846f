"""LoRA through peft: add, switch off (the reference policy), merge for export."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError


def add_lora(
    model: PreTrainedModel,
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    use_rslora: bool = False,
) -> PeftModel:
    """Return `model` with LoRA layers (arXiv 2106.09685); a `score` head stays fully trainable.

    Args:
        r: rank of the update.
        alpha: the update is scaled by alpha / r (alpha / sqrt(r) with `use_rslora`).
        target_modules: names of linear layers, or "all-linear" for all but the head.

    Raises:
        UserError: a rank below one, or no layer of the names in `target_modules`.
    """
    has_score = isinstance(getattr(model, "score", None), nn.Linear)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    try:
        config = LoraConfig(
            # not SEQ_CLS: peft would train a copy of the head, which is lost on save and merge
            task_type=None if has_score else "CAUSAL_LM",
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=targets,
            use_rslora=use_rslora,
            exclude_modules=["score"] if has_score else None,
        )
        with warnings.catch_warnings():  # peft reads a property that transformers 5.24 renamed
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"adapter: {error}") from error
    if has_score:
        model.score.requires_grad_(True)  # type: ignore[union-attr, operator]
    return wrapped  # type: ignore[return-value]


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Run with LoRA switched off; without LoRA it does nothing."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    else:
        yield


def merge_lora(model: nn.Module) -> Any:
    """Return a plain Hugging Face model for saving: a merged copy of a LoRA model, or the model itself."""
    if not isinstance(model, PeftModel):
        return model
    merged = copy.deepcopy(model).merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    return merged
