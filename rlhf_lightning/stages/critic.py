"""What the critic of an online stage starts as: a value head on the policy, or the reward model."""

from __future__ import annotations

from typing import Any

from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.rewards.spec import parse

CRITICS = ("auto", "value_head", "reward")


def critic_model(settings: dict[str, Any], policy: str) -> str | None:
    """Return the reward model that the critic starts as, None for a value head on the policy or no critic.

    `critic=auto` is the reward model, as in InstructGPT (arXiv 2203.02155 appendix C), where it reads the policy's
    tokens and every weight is trained; a LoRA policy gets the value head, for the memory of a second model.

    Args:
        policy: the model that is trained.

    Raises:
        UserError: another value of `critic`, or "reward" without one reward model that has the policy's tokenizer.
    """
    model, name = critic_candidate(settings), settings["stage"]
    if model is None or load_tokenizer(policy).get_vocab() == load_tokenizer(model).get_vocab():
        return model
    if settings[name]["critic"] == "reward":
        raise UserError(f"{name}.critic=reward: policy and reward model have different tokenizers")
    return None


def critic_candidate(settings: dict[str, Any]) -> str | None:
    """Return the reward model that the critic starts as if its tokenizer is the policy's, which is not looked at."""
    name = settings["stage"]
    critic = settings[name].get("critic", "value_head")
    if critic not in CRITICS:
        raise UserError(f"{name}.critic={critic!r} is not one of {', '.join(CRITICS)}.{nearest(critic, CRITICS)}")
    if critic == "value_head" or (critic == "auto" and settings["adapter"]):
        return None
    rewards = parse(settings["reward_from"])
    if len(rewards) == 1 and rewards[0].is_model:
        return rewards[0].name
    if critic == "reward":
        raise UserError(f"{name}.critic=reward needs reward_from=<reward model folder>")
    return None
