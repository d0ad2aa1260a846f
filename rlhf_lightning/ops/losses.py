"""Losses of the DPO family and of PPO, one value per item; the caller normalizes over the whole step."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

PreferenceLoss = Literal["sigmoid", "ipo", "robust", "simpo"]
PREFERENCE_LOSSES = get_args(PreferenceLoss)
LossType = Literal["dapo", "grpo", "dr_grpo"]


def preference_loss(
    logits: Tensor,
    beta: float,
    kind: PreferenceLoss = "sigmoid",
    label: Tensor | float = 1.0,
    label_smoothing: float = 0.0,
    target_margin: float = 0.0,
) -> Tensor:
    """Return the direct-preference loss of each pair.

    With h the difference of log(pi / pi_ref), chosen minus rejected (SimPO: of log pi alone):

    * sigmoid: -p log sigma(beta h) - (1 - p) log sigma(-beta h), p = label (1 - eps) + (1 - label) eps. DPO
      (arXiv 2305.18290 eq. 7); eps > 0 is conservative DPO (Mitchell 2023).
    * robust: [(1 - eps) L(h) - eps L(-h)] / (1 - 2 eps), unbiased under label noise eps
      (arXiv 2403.00409 eq. 3).
    * ipo: (h - 1 / (2 beta))^2 with h from length-averaged log-probabilities (arXiv 2310.12036 eq. 17).
    * simpo: -log sigma(beta h - target_margin), averaged log-probabilities, no reference
      (arXiv 2405.14734 eq. 6).

    Args:
        logits: (P,) h.
        beta: weight of the implicit KL to the reference, > 0; larger stays closer to it.
        label: (P,) probability that the chosen response is the better one.
        label_smoothing: eps in [0, 0.5); ipo does not use it.
        target_margin: SimPO's gamma; the other sigmoid kinds subtract it from beta h as well, ipo does not.

    Returns:
        (P,) losses.
    """
    if kind == "ipo":
        margin = 1 / (2 * beta)
        return label * (logits - margin) ** 2 + (1 - label) * (logits + margin) ** 2
    win, lose = -F.logsigmoid(beta * logits - target_margin), -F.logsigmoid(-beta * logits - target_margin)
    if kind == "robust":
        win, lose = (
            ((1 - label_smoothing) * win - label_smoothing * lose) / (1 - 2 * label_smoothing),
            ((1 - label_smoothing) * lose - label_smoothing * win) / (1 - 2 * label_smoothing),
        )
        return label * win + (1 - label) * lose
    preferred = label * (1 - label_smoothing) + (1 - label) * label_smoothing
    return preferred * win + (1 - preferred) * lose


def ppo_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Return -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = pi / pi_old, and where it was clipped.

    Any shape, the same for all; source: arXiv 1707.06347 eq. 7.
    """
    ratio = (logprobs - old_logprobs).exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -torch.minimum(unclipped, clipped), clipped < unclipped


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None = 0.2
) -> tuple[Tensor, Tensor]:
    """Return max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / 2 and where the clipped error is larger.

    Any shape, the same for all; the maximum keeps the gradient of a value that moved away from its return
    (baselines ppo2).
    """
    unclipped = (values - returns) ** 2
    if clip is None:
        return 0.5 * unclipped, torch.zeros_like(unclipped, dtype=torch.bool)
    clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


def response_weights(lengths: Tensor, kind: LossType, tokens: float, responses: float, max_new_tokens: int) -> Tensor:
    """Return the weight (S,) of every token of each response; the loss is the weighted sum over all tokens.

    * dapo: 1 / `tokens`, the mean over the tokens of the minibatch (arXiv 2503.14476 eq. 8).
    * grpo: 1 / (`responses` |y|), the mean over responses of the mean over their tokens (arXiv 2402.03300 eq. 3).
    * dr_grpo: 1 / (`responses` `max_new_tokens`), a constant, so that length has no influence (arXiv 2503.20783).

    Args:
        lengths: (S,) tokens |y| of each response.
        tokens, responses: of the whole minibatch, over all ranks.
    """
    if kind == "dapo":
        return torch.full_like(lengths, 1 / tokens, dtype=torch.float32)
    return 1 / (responses * (lengths.float() if kind == "grpo" else torch.full_like(lengths, max_new_tokens).float()))
