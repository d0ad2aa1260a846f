"""`rlhf stage=ppo`, `rloo`, `grpo`: training on rewards of the policy's own responses."""

from __future__ import annotations

from functools import partial
from typing import Any

from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.rewards.groups import load_critic
from rlhf_lightning.rewards.spec import parse
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages.training import train

CRITICS = ("auto", "value_head", "reward")


def run(run: Run) -> float | None:
    """Train a policy against a reward."""
    folder, settings, options = run.start_folder(), run.settings, run.options
    load, name = settings["model"]["load"], run.stage.name
    reward = run.reward("reward_from")
    if reward is None:
        raise UserError("reward_from is needed: a reward model folder, module:function, or world")
    if options["ptx_coef"] and not settings["data"].get("ptx"):
        raise UserError(f"{name}.ptx_coef needs demonstrations: data.ptx=<file>")
    if settings["trainer"]["accumulate_grad_batches"] != 1 or settings["trainer"]["gradient_clip_val"]:
        raise UserError(
            f"{name} accumulates and clips gradients itself: leave trainer.accumulate_grad_batches at 1, "
            f"trainer.gradient_clip_val at null; use {name}.microbatch_tokens and {name}.max_grad_norm"
        )
    if (model := critic_model(settings, folder)) is not None:
        options["load_critic"] = partial(load_critic, model, settings["reward_groups"], **load)
    options.pop("critic", None)
    return train(
        run,
        folder,
        partial(load_causal_lm, folder, **load),
        reward=reward,
        gold=run.reward("gold_from"),
        engine=run.build("sampler"),
        seed=settings["seed"],
        **options,
    )


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
