"""The tokens that end a response: what a model names, and what is saved with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def eos_ids(model: Any) -> set[int]:
    """Return the EOS tokens in the config and the generation config of a model; either may name several."""
    found: list[int | None] = []
    for owner in _owners(model):
        given = getattr(owner, "eos_token_id", None)
        found += given if isinstance(given, list | tuple) else [given]
    return {token for token in found if token is not None}


def set_eos(model: Any, tokenizer: Any, learned: Sequence[int]) -> None:
    """Name the tokens that were learned as the end of a turn as EOS, the first also in the tokenizer.

    The tokens that config and generation config already name stay. The tokenizer's EOS stays where its chat template
    writes that token.
    """
    ids = [*learned, *sorted(eos_ids(model) - {*learned})]
    for owner in _owners(model):
        owner.eos_token_id = ids if len(ids) > 1 else ids[0]
    if "eos_token" not in str(tokenizer.chat_template):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(learned[0])


def _owners(model: Any) -> list[Any]:
    owners = [model.config, model.config.get_text_config(), getattr(model, "generation_config", None)]
    return [owner for owner in owners if owner is not None]
