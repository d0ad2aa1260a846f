"""What the options of online methods may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from rlhf_lightning.errors import UserError, check_number, nearest
from rlhf_lightning.ops.kl import KLEstimator
from rlhf_lightning.ops.losses import LossType

Estimator = Literal["gae", "rloo", "grpo"]
KLIn = Literal["reward", "loss"]
CHOICES = {
    "estimator": get_args(Estimator), "kl_estimator": get_args(KLEstimator), "kl_in": get_args(KLIn),
    "loss_type": get_args(LossType),
}  # fmt: skip
RANGES = {
    "temperature": "(0, inf)", "microbatch_tokens": "[1, inf)", "missing_eos_penalty": "(-inf, inf)",
    "missing_eos_score": "(-inf, inf)", "reward_clip": "(0, inf)", "kl_beta": "[0, inf)", "kl_target": "(0, inf)",
    "kl_horizon": "(0, inf)", "gamma": "[0, 1]", "lam": "[0, 1]", "critic_lam": "[0, 1]", "clip_low": "[0, 1)",
    "clip_high": "[0, inf)", "value_clip": "(0, inf)", "vf_coef": "[0, inf)", "entropy_coef": "[0, inf)",
    "ptx_coef": "[0, inf)", "target_kl": "(0, inf)", "max_grad_norm": "[0, inf)", "critic_lr": "[0, inf)",
    "critic_refit": "(0, inf)",
    "beta": "(0, inf)",
}  # fmt: skip
COUNTS = {
    "num_generations": "[1, inf)", "max_new_tokens": "[1, inf)", "ppo_epochs": "[1, inf)",
    "num_minibatches": "[1, inf)", "critic_warmup": "[0, inf)",
}  # fmt: skip

NOT_OF = {"rloo": ("whiten_rewards",), "grpo": ("whiten_rewards", "whiten_advantages")}
"""Options that an estimator has no use for."""


def check_ranges(stage: str, given: Mapping[str, Any]) -> None:
    """Raise a UserError for a number outside its range; None is no number."""
    for table, whole in ((RANGES, False), (COUNTS, True)):
        for key, interval in table.items():
            if given.get(key) is not None:
                check_number(f"{stage}.{key}", given[key], interval, whole)


def check_options(given: Mapping[str, Any]) -> None:
    """Raise a UserError for an option of PPO, RLOO or GRPO outside its range, or for options that exclude others."""
    estimator = given["estimator"]
    stage = str(estimator) if estimator in ("rloo", "grpo") else "ppo"
    for key, options in CHOICES.items():
        if given[key] not in options:
            hint = nearest(given[key], options)
            raise UserError(f"{stage}.{key}={given[key]!r} is not one of {', '.join(options)}.{hint}")
    check_ranges(stage, given)
    if estimator != "gae" and given["num_generations"] < 2:
        raise UserError(
            f"{estimator} compares responses to one prompt: num_generations={given['num_generations']} must be at "
            "least 2"
        )
    for key in NOT_OF.get(estimator, ()):
        if given[key]:
            raise UserError(f"{key}={given[key]} is not of {estimator}, which compares the responses to one prompt")
    for key in ("critic_warmup", "critic_refit"):
        if estimator != "gae" and given[key]:
            raise UserError(f"{key}={given[key]} is of PPO; {estimator} has no critic")
    if given["kl_in"] == "loss" and given["kl_estimator"] == "k1":
        raise UserError("kl_in=loss with kl_estimator=k1 has no gradient in expectation; use k2 or k3")
