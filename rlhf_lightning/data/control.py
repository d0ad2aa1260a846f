"""Control tokens: which they are, and text that never becomes one, whatever the tokenizer's normalizer makes of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from rlhf_lightning.data.records import RowError

SPELLED = re.compile(r"<[^<>\s{}]+>|\[/?[A-Z_]+\]")
"""How role markers look that a vocabulary has like any other piece."""


def control_tokens(tokenizer: Any, template: str) -> dict[str, int]:
    """Return text -> id of the tokens that only a template may write.

    Args:
        template: the source of the chat template and what it writes around messages.
    """
    added = tokenizer.added_tokens_decoder
    control = {str(token): i for i, token in added.items() if token.special or str(token) in template}
    control |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    vocabulary = tokenizer.get_vocab()
    return control | {text: vocabulary[text] for text in set(SPELLED.findall(template)) if text in vocabulary}


def forbidden_ids(tokenizer: Any, control: dict[str, int]) -> frozenset[int]:
    """Return the ids that no text may become; an unknown character is the unknown token, where that is nothing else."""
    ends = (tokenizer.eos_token_id, tokenizer.bos_token_id)
    unknown = {tokenizer.unk_token_id} - {*ends}
    return frozenset(control.values()) - unknown


def without_control(
    tokenizer: Any, text: str, encode: Callable[[str], list[int]], forbidden: Collection[int]
) -> list[int]:
    """Return the tokens of a text that the tokenizer reads as control tokens: their characters one by one.

    A normalizer that folds case or width finds "<|EOS|>" to be "<|eos|>"; what it found is looked for in its result.

    Raises:
        RowError: a character that is itself a control token.
    """
    found = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    ids: list[int] = []
    place = 0
    for token, (begin, end) in zip(found.ids, found.offsets, strict=True):
        if token in forbidden:
            ids += encode(text[place:begin])
            ids += [i for character in text[begin:end] for i in encode(character)]
            place = end
    ids += encode(text[place:])
    for token in ids:
        if token in forbidden:
            name = tokenizer.convert_ids_to_tokens(token)
            raise RowError(f"a text contains what this tokenizer reads as its control token {name!r}")
    return ids
