"""The attention rule of completion groups, entry by entry."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.ops.masking import group_attention_mask


def test_mask_of_one_group_by_hand() -> None:
    """Row: p p a a b and a pad; b sees the prompt and itself, never a."""
    found = group_attention_mask(torch.tensor([[0, 0, 0, 0, 0, -1]]), torch.tensor([[0, 0, 1, 1, 2, 0]]))
    assert found.shape == (1, 1, 6, 6)
    assert found.dtype == torch.bool
    assert found[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


layouts = st.lists(st.tuples(st.integers(1, 3), st.lists(st.integers(1, 3), max_size=3)), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(layouts, st.integers(0, 3))
def test_mask_is_the_rule(layout: list[tuple[int, list[int]]], padding: int) -> None:
    tokens = [
        (group, response)
        for group, (prompt, lengths) in enumerate(layout)
        for response, length in enumerate([prompt, *lengths])
        for _ in range(length)
    ] + [(-1, 0)] * padding
    groups, responses = (torch.tensor([column]) for column in zip(*tokens, strict=True))
    mask = group_attention_mask(groups, responses)[0, 0]
    for i, (group, response) in enumerate(tokens):
        for j, (other, spoken) in enumerate(tokens):
            allowed = group == other and j <= i and spoken in (0, response)
            assert mask[i, j].item() is allowed
    assert mask.diagonal().all()  # no row is empty: softmax of nothing is not a number
