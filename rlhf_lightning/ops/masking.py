"""The one attention rule of completion groups."""

from __future__ import annotations

import torch
from torch import Tensor


def group_attention_mask(
    group_ids: Tensor, response_ids: Tensor, position_ids: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Return the boolean attention mask of packed completion groups.

    Token i attends to token j when both are in the same group, j is not after i, and j is in the prompt or
    in the same response as i; with a sliding window of w tokens, when in addition position_i - position_j < w.
    Padding (group id -1) attends to padding only, so that no row of the mask is empty.

    Args:
        group_ids: (R, L) group of each token, -1 for padding.
        response_ids: (R, L) 0 for prompt tokens, k >= 1 for the k-th response.
        position_ids: (R, L) positions, which restart after the prompt in every response; needed with a window.
        window: of sliding-window attention, None for full attention.

    Returns:
        (R, 1, L, L) bool, True where attention is allowed.
    """
    length = group_ids.shape[1]
    causal = group_ids.new_ones((length, length), dtype=torch.bool).tril()
    same_group = group_ids[:, :, None] == group_ids[:, None, :]
    visible = (response_ids[:, None, :] == 0) | (response_ids[:, :, None] == response_ids[:, None, :])
    allowed = same_group & visible & causal
    if window is not None and position_ids is not None:
        allowed &= position_ids[:, :, None] - position_ids[:, None, :] < window
    return allowed.unsqueeze(1)
