"""The layout: flat indices point where they should, and packed equals padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.ops.groups import Group, pack
from rlhf_lightning.ops.masking import group_attention_mask
from rlhf_lightning.ops.ranking import ranked_pairs

token = st.integers(3, 60)
response = st.lists(token, min_size=1, max_size=6)
group = st.builds(Group, st.lists(token, min_size=1, max_size=5), st.lists(response, min_size=1, max_size=4))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.lists(group, min_size=1, max_size=5), st.integers(4, 40), st.sampled_from(["packed", "padded"]))
def test_indices_point_at_the_tokens(groups: list[Group], row_tokens: int, layout: str) -> None:
    batch = pack(groups, row_tokens=row_tokens, layout=layout)  # type: ignore[arg-type]
    flat = batch.input_ids.flatten()
    expected = [list(r) for g in groups for r in g.responses]
    found = [batch.targets[batch.sequence_ids == s].tolist() for s in range(batch.sequences)]
    assert found == expected
    assert flat[batch.last].tolist() == [r[-1] for r in expected]
    previous = [[g.prompt[-1], *r[:-1]] for g in groups for r in g.responses]
    assert flat[batch.source].tolist() == [t for row in previous for t in row]
    # the position of every predicting token is one less than its target's place in prompt + response
    places = [len(g.prompt) + t - 1 for g in groups for r in g.responses for t in range(len(r))]
    assert batch.position_ids.flatten()[batch.source].tolist() == places
    assert batch.group_of.tolist() == [i for i, g in enumerate(groups) for _ in g.responses]
    assert (batch.group_ids >= 0).sum() == sum(
        g.tokens if layout == "packed" else sum(len(g.prompt) + len(r) for r in g.responses) for g in groups
    )


def test_pairs_and_tokens_of_a_batch() -> None:
    ranked = [Group([1], [[2]] * 4, ranks=[1, 0, 1, 2]), Group([1, 3], [[2]]), Group([1], [[2], [3, 2]])]
    for layout in ("packed", "padded"):
        batch = pack(ranked, layout=layout)  # type: ignore[arg-type]
        better, worse = ranked_pairs(batch.ranks, batch.group_of)
        assert batch.better.tolist() == better.tolist() == [0, 1, 1, 1, 2, 5]
        assert batch.worse.tolist() == worse.tolist() == [3, 0, 2, 3, 3, 6]
        assert batch.tokens == (batch.group_ids >= 0).sum()
    assert len(pack(ranked[1:2]).better) == 0


def test_rows_stay_within_the_budget_unless_a_group_is_longer() -> None:
    groups = [Group([1] * 4, [[2] * n]) for n in (3, 5, 12, 1, 4)]
    batch = pack(groups, row_tokens=10)
    used = (batch.group_ids >= 0).sum(1).tolist()
    assert max(used) == 16  # the group of 16 tokens defines the capacity
    assert sum(used) == sum(g.tokens for g in groups)


@pytest.mark.parametrize(
    ("tokens", "row_tokens", "shape"),
    [
        ([7, 6, 5, 4, 3], 13, (3, 9)),  # 27 places for 25 tokens; two rows of 13 cannot hold them in this order
        ([7, 6, 5, 4, 3], 14, (3, 9)),  # nor are two rows of 14 places fewer
        ([8, 8, 8, 8], 16, (2, 16)),  # equal areas: the fewer rows
        ([30, 2, 2, 2], 10, (2, 30)),
        ([5], 3, (1, 5)),
    ],
)
def test_rows_are_as_many_as_pad_least(tokens: list[int], row_tokens: int, shape: tuple[int, int]) -> None:
    batch = pack([Group([1], [[2] * (n - 1)]) for n in tokens], row_tokens=row_tokens)
    assert tuple(batch.input_ids.shape) == shape


def test_counted_flags_select_the_learned_tokens() -> None:
    batch = pack([Group([1, 2], [[5, 6, 7, 8]], loss_mask=[[True, False, False, True]])])
    assert batch.targets.tolist() == [5, 8]
    assert batch.lengths.tolist() == [2]
    assert batch.input_ids.flatten()[batch.source].tolist() == [2, 7]
    assert batch.last.tolist() == [5]


def test_attention_rule_by_hand() -> None:
    batch = pack([Group([1, 2], [[3], [4, 5]]), Group([6], [[7]])], row_tokens=8)
    mask = group_attention_mask(batch.group_ids, batch.response_ids)[0, 0].int()
    assert mask.tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def test_padding_rows_of_the_mask_are_never_empty() -> None:
    batch = pack([Group([1, 2, 3], [[3]]), Group([6], [[7]])], row_tokens=4, layout="padded")
    assert group_attention_mask(batch.group_ids, batch.response_ids).any(-1).all()


def test_weights_default_to_the_mean_of_the_batch(groups: list[Group]) -> None:
    batch = pack(groups)
    assert batch.per_token == pytest.approx(1 / sum(g.loss_tokens for g in groups))
    assert batch.per_group == pytest.approx(1 / 3)
    moved = batch.to("cpu", dtype=torch.long)
    assert moved.per_token == batch.per_token
