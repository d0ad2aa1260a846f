"""What the tokenized rows of a run must have.

A check returns a summary, as a :class:`Note` where a person should look, and raises a UserError with the row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf_lightning.errors import UserError


class Note(str):
    """A result that is worth a look without being an error."""


Check = tuple[str, Callable[[], str]]
"""The title of a check, and the check."""

LOOKED_AT = 256
"""Rows whose tokens are checked at every start; `stage=audit` reads all."""


def loss_mask_is_not_empty(data: Any, split: str) -> str:
    """Every row has a token in the loss mask."""
    tokens = data.rows[split].loss_tokens
    empty = np.flatnonzero(tokens == 0)
    if len(empty):
        more = f" (and {len(empty) - 1} more rows)" if len(empty) > 1 else ""
        raise UserError(
            f"{data.where(split, [int(empty[0])])}: no token of the response is learned{more}; look at the row, and at "
            "data.max_length and data.turns"
        )
    return f"{len(tokens)} rows, {tokens.min()} to {tokens.max()} tokens in the loss mask of each"


def ends_are_learned(data: Any, split: str, rows: int = LOOKED_AT) -> str:
    """Some response ends with EOS, and that token is in the loss mask; else the model never learns to stop."""
    ended = cut = 0
    for row in range(min(rows, len(data.rows[split]))):
        group = data.rows[split][row]
        if len(group.prompt) > 1:  # a raw text has no prompt but its start token, and may be cut anywhere
            masks = group.loss_mask or [[True] * len(response) for response in group.responses]
            learned = [y[-1] in data.template.eos_ids and m[-1] for y, m in zip(group.responses, masks, strict=True)]
            ended, cut = ended + sum(learned), cut + len(learned) - sum(learned)
    if cut and not ended:
        raise UserError(
            f"data.{split}: none of {cut} responses ends with EOS, all are cut at data.max_length={data.max_length}; "
            "raise it, or the model never learns to stop"
        )
    text = f"{ended} of {ended + cut} responses end with EOS" + (", the others are cut at data.max_length" * (cut > 0))
    return Note(text) if cut > ended else text


def ids_fit(data: Any, split: str, vocabulary: int) -> str:
    """Every token id of every row is a row of the model's embedding."""
    highest, row = data.rows[split].highest_id()
    if highest >= vocabulary:
        raise UserError(
            f"{data.where(split, [row])} contains the token id {highest}, but the model's vocabulary has "
            f"{vocabulary} ids; the tokenizer is not this model's, or has tokens that the model was not resized for"
        )
    end = max(data.template.eos_ids)
    if end >= vocabulary:
        raise UserError(f"the EOS id {end} is not among the {vocabulary} ids of the model's vocabulary")
    return f"ids up to {max(highest, end)} of {vocabulary}"


def check_rows(data: Any, vocabulary: int) -> None:
    """Run the checks that every training run makes before its first step."""
    for part in filter(None, (data, getattr(data, "ptx", None))):
        for split in part.rows:
            if part.kind != "prompts":
                loss_mask_is_not_empty(part, split)
                ends_are_learned(part, split)
            ids_fit(part, split, vocabulary)
