"""`rlhf stage=ppo`, `rloo`, `grpo`: training on rewards of the policy's own responses."""

from __future__ import annotations

from functools import partial
from typing import Any

from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer
from rlhf_lightning.rewards.spec import parse
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages.training import train

CRITICS = ("value_head", "reward")


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
    if (critic := options.pop("critic", "value_head")) != "value_head":
        options["load_critic"] = critic_loader(critic, folder, settings["reward_from"], load)
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


def critic_loader(critic: str, policy: str, reward_from: Any, load: dict[str, Any]) -> Any:
    """Return what loads a critic that starts as the reward model.

    Raises:
        UserError: another value of `ppo.critic`, or a reward that is not one model with the policy's tokenizer.
    """
    if critic not in CRITICS:
        raise UserError(f"ppo.critic={critic!r} is not one of {', '.join(CRITICS)}.{nearest(critic, CRITICS)}")
    models = parse(reward_from)
    if len(models) != 1 or not models[0].is_model:
        raise UserError("ppo.critic=reward needs reward_from=<reward model folder>")
    if load_tokenizer(policy).get_vocab() != load_tokenizer(models[0].name).get_vocab():
        raise UserError("ppo.critic=reward: policy and reward model have different tokenizers")
    return partial(load_scalar_model, models[0].name, trained=True, **load)
