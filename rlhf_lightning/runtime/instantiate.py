"""Allow-listed instantiation: the only way from a `_target_` in the configuration to code.

Interpolations are resolved once, into plain dicts and lists, and these are checked and built. Hydra's `instantiate` is
not used: it makes a configuration of them again, in which a text such as "${oc.create:...}" is one more interpolation.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Collection, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import UserError, nearest

# What a configuration may name, beside `public_classes`. Exact names, not prefixes: torch.load lives under torch, too.
ALLOWED = frozenset(
    {
        "bitsandbytes.optim.AdamW8bit",
        "lightning.pytorch.Trainer",
        "lightning.pytorch.strategies.DDPStrategy",
        "rlhf_lightning.callbacks.checkpoints.RandomState",
        "rlhf_lightning.callbacks.checkpoints.StepCheckpoint",
        "rlhf_lightning.callbacks.histograms.Histograms",
        "rlhf_lightning.callbacks.models.ModelFolders",
        "rlhf_lightning.callbacks.samples.Samples",
        "rlhf_lightning.callbacks.smoothed.Smoothed",
        "rlhf_lightning.callbacks.throughput.Throughput",
        "rlhf_lightning.callbacks.throughput.batch_rows",
        "rlhf_lightning.callbacks.throughput.batch_tokens",
        "rlhf_lightning.data.datamodules.DemonstrationData",
        "rlhf_lightning.data.datamodules.PreferenceData",
        "rlhf_lightning.data.datamodules.PromptData",
        "rlhf_lightning.generation.continuous.ContinuousEngine",
        "rlhf_lightning.generation.local.LocalEngine",
        "rlhf_lightning.generation.vllm.VLLMEngine",
        "rlhf_lightning.modules.dpo.DPO",
        "rlhf_lightning.modules.online_dpo.OnlineDPO",
        "rlhf_lightning.modules.ppo.PPO",
        "rlhf_lightning.modules.reward.RewardModel",
        "rlhf_lightning.modules.schedules.schedule",
        "rlhf_lightning.modules.sft.SFT",
        "rlhf_lightning.evaluation.probes.callback.Probes",
        "rlhf_lightning.feedback.candidates.Candidates",
        "rlhf_lightning.runtime.strategies.ShardedStrategy",
    }
)
PUBLIC = {
    "lightning.pytorch.callbacks": "Callback",
    "lightning.pytorch.loggers": "Logger",
    "lightning.pytorch.profilers": "Profiler",
    "torch.optim": "Optimizer",
}
"""Modules -> the base of the public classes in them that a configuration may name."""
REPLACED = {"FSDPStrategy": "strategy=fsdp2", "DeepSpeedStrategy": "strategy=fsdp2"}
"""Classes that are not supported -> what is there instead."""
EXTRAS = {
    "bitsandbytes": "8bit",
    "hydra_plugins.hydra_joblib_launcher": "sweeps",
    "hydra_plugins.hydra_optuna_sweeper": "sweeps",
    "mlflow": "mlflow",
    "openai": "judge",
    "starlette": "label",
    "uvicorn": "label",
    "wandb": "wandb",
}
"""Packages -> the extra of this project that installs them."""


@cache
def public_classes() -> dict[str, type]:
    """Return name -> class of Lightning's callbacks, loggers and profilers and torch's optimizers.

    Each under the name it is published by and the one where it is defined. Nothing that a configuration names is
    imported to find it.
    """
    classes: dict[str, type] = {}
    for place, base in PUBLIC.items():
        module = importlib.import_module(place)
        for name in getattr(module, "__all__", dir(module)):
            found = getattr(module, name, None)
            if inspect.isclass(found) and issubclass(found, getattr(module, base)):
                classes |= {f"{place}.{name}": found, f"{found.__module__}.{found.__qualname__}": found}
    return classes


def allowed_targets() -> Collection[str]:
    """Return every name that a configuration may give as a `_target_`."""
    return {*ALLOWED, *public_classes()}


def resolve(target: str, key: str) -> Any:
    """Return what an allowed name stands for; the user's own are found in the working directory, too.

    Raises:
        UserError: it cannot be imported; a package of an extra is named with the extra.
    """
    if target in public_classes():
        return public_classes()[target]
    if target not in ALLOWED and not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))  # last: a file there does not hide an installed package
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        if missing := missing_extra(error):
            raise UserError(f"{key}: {missing}") from error
        raise UserError(f"{key}._target_={target} cannot be imported: {error}") from error


def missing_extra(error: BaseException) -> str | None:
    """Return what to install when a package of an extra is missing, None for another error."""
    if not isinstance(error, ImportError):
        return None
    for package, extra in EXTRAS.items():
        if re.search(rf"\b{re.escape(package)}\b", str(error)):
            return f"{package} is not installed: pip install 'rlhf-lightning[{extra}]'"
    return None


MISSING = "???"
SPECIAL = {"_target_": None, "_args_": (), "_partial_": False, "_recursive_": True, "_convert_": "all"}
"""Keys of Hydra's that are no arguments, and what they are when absent."""


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


def texts(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield (key, text) for every text below `node`, a dict or list."""
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, dict | list):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from texts(value, f"{path}.{name}")


def check_escaped(settings: Any, key: str) -> None:
    """Raise a UserError for a text below `settings` that would be an interpolation, were it resolved once more."""
    for where, text in texts(settings, key):
        if "${" in text:
            raise UserError(f"{where}={text!r} is an interpolation that was escaped; leave out the backslash")


def check_targets(settings: Any, key: str, allowed: Collection[str]) -> None:
    """Raise a UserError for the first `_target_` below `settings`, dicts and lists, that is not allowed."""
    for where, target in targets(settings, key):
        if target not in allowed and target.rpartition(".")[2] in REPLACED:
            raise UserError(f"{where}={target} is not supported: use {REPLACED[target.rpartition('.')[2]]}")
        if target not in allowed:
            raise UserError(
                f"{where}={target} is not an allowed target.{nearest(target, allowed)} To trust it, add "
                f"allow_targets=[{target}] on the command line"
            )


def instantiate(settings: dict[str, Any], key: str, allow: Collection[str] = (), **arguments: Any) -> Any:
    """Build what `settings` names, after checking every `_target_` in it against the list of allowed ones.

    Hydra's `_args_`, `_partial_` and `_recursive_` mean what they mean there; `_convert_` is always "all".

    Args:
        settings: values of a configuration, resolved, with a `_target_`.
        key: where it stands in the configuration, for messages.
        allow: further exact names the user trusts.
        arguments: added to the call as they are; a `_target_` inside them is not looked at.

    Raises:
        UserError: a target that is not allowed, or arguments the target refuses.
    """
    check_targets(settings, key, {*allowed_targets(), *allow})
    check_escaped(settings, key)
    return _build({name: value for name, value in settings.items() if name not in arguments}, key, arguments)


def _build(value: Any, key: str, arguments: dict[str, Any] | None = None) -> Any:
    """Return `value` with every dict that has a `_target_` replaced by what that returns."""
    if isinstance(value, list):
        return [_build(member, f"{key}[{number}]") for number, member in enumerate(value)]
    if not isinstance(value, dict):
        return value
    special = {name: value.get(name, default) for name, default in SPECIAL.items()}
    inner = {name: member for name, member in value.items() if name not in SPECIAL and member != MISSING}
    if special["_recursive_"]:
        inner = {name: _build(member, f"{key}.{name}") for name, member in inner.items()}
    if special["_target_"] is None:
        return inner
    try:
        target = resolve(special["_target_"], key)
        given = [_build(member, f"{key}._args_[{number}]") for number, member in enumerate(special["_args_"])]
        call = partial(target, *given, **(inner | (arguments or {})))
        return call if special["_partial_"] else call()
    except UserError:
        raise
    except Exception as error:  # whatever the target raises
        reason = missing_extra(error) or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{key}: {reason}") from error
