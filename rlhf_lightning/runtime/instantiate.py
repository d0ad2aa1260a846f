"""Allow-listed instantiation: the only way from a `_target_` in the configuration to code."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_lightning.errors import UserError, nearest

# Every callable a configuration may name. Exact names, not prefixes: torch.load lives under torch, too.
ALLOWED = frozenset(
    {
        "lightning.pytorch.Trainer",
        "lightning.pytorch.callbacks.EarlyStopping",
        "lightning.pytorch.loggers.CSVLogger",
        "lightning.pytorch.loggers.TensorBoardLogger",
        "lightning.pytorch.strategies.DDPStrategy",
        "rlhf_lightning.callbacks.checkpoints.RandomState",
        "rlhf_lightning.callbacks.checkpoints.StepCheckpoint",
        "rlhf_lightning.callbacks.samples.Samples",
        "rlhf_lightning.callbacks.throughput.Throughput",
        "rlhf_lightning.data.datamodules.DemonstrationData",
        "rlhf_lightning.data.datamodules.PreferenceData",
        "rlhf_lightning.data.datamodules.PromptData",
        "rlhf_lightning.generation.local.LocalEngine",
        "rlhf_lightning.modules.dpo.DPO",
        "rlhf_lightning.modules.ppo.PPO",
        "rlhf_lightning.modules.reward.RewardModel",
        "rlhf_lightning.modules.schedules.schedule",
        "rlhf_lightning.modules.sft.SFT",
        "rlhf_lightning.feedback.candidates.Candidates",
        "rlhf_lightning.runtime.strategies.ShardedStrategy",
        "torch.optim.Adam",
        "torch.optim.AdamW",
        "torch.optim.SGD",
    }
)


def targets(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, target) for every `_target_` below `node`, a dict or list."""
    if isinstance(node, dict):
        for key, value in node.items():
            where = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                yield where, str(value)
            else:
                yield from targets(value, where)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from targets(value, f"{path}[{number}]")


def instantiate(node: DictConfig, key: str, allow: list[str] | None = None, **arguments: Any) -> Any:
    """Build what `node` names, after checking every `_target_` in it against the list of allowed ones.

    Args:
        node: configuration with a `_target_`; lists and dicts in it are passed as Python lists and dicts.
        key: where it stands in the configuration, for messages.
        allow: further exact names the user trusts.
        arguments: added to the call as they are; a `_target_` inside them is not looked at.

    Raises:
        UserError: a target that is not allowed, or arguments the target refuses.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as build

    settings: Any = OmegaConf.to_container(node, resolve=True)
    allowed = ALLOWED | set(allow or [])
    for where, target in targets(settings, key):
        if target not in allowed:
            raise UserError(
                f"{where}={target} is not an allowed target.{nearest(target, allowed)} To trust it, add "
                f"allow_targets=[{target}] on the command line"
            )
    is_partial = settings.pop("_partial_", False)
    settings = {name: value for name, value in settings.items() if name not in arguments}
    try:
        target_partial = build(OmegaConf.create(settings | {"_partial_": True}), _convert_="all")
        return partial(target_partial, **arguments) if is_partial else target_partial(**arguments)
    except UserError:
        raise
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"{key}: {str(cause or error).splitlines()[0]}") from error
    except Exception as error:  # whatever the target raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{key}: {reason}") from error
