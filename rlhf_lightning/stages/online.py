"""`rlhf stage=ppo`, `rloo`, `grpo`, `online_dpo`: training on rewards of the policy's own responses."""

from __future__ import annotations

from functools import partial

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.rewards.groups import load_critic
from rlhf_lightning.runtime.memory import AUTO
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages.critic import critic_model
from rlhf_lightning.stages.training import train


def run(run: Run) -> float | None:
    """Train a policy against a reward."""
    folder, settings, options = run.start_folder(), run.settings, run.options
    load, name = settings["model"]["load"], run.stage.name
    reward = run.reward("reward_from")
    if reward is None:
        raise UserError("reward_from is needed: a reward model folder, module:function, judge:<judge>, or world")
    if options.get("ptx_coef") and not settings["data"].get("ptx"):
        raise UserError(f"{name}.ptx_coef needs demonstrations: data.ptx=<file>")
    if settings["trainer"]["accumulate_grad_batches"] not in (1, AUTO) or settings["trainer"]["gradient_clip_val"]:
        raise UserError(
            f"{name} accumulates and clips gradients itself: leave trainer.accumulate_grad_batches at auto, "
            f"trainer.gradient_clip_val at null; use {name}.microbatch_tokens and {name}.max_grad_norm"
        )
    if options["offload"] and settings["trainer"]["accelerator"] == "cpu":
        raise UserError(
            f"{name}.offload=true moves models between an accelerator and the CPU; trainer=cpu has only that"
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
