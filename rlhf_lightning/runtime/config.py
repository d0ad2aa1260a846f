"""The guarded door between configuration and code, and readable words for configuration mistakes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.rewards.spec import code_key

# Every callable a configuration may name. Exact names, not prefixes: torch.load lives under torch, too.
ALLOWED = frozenset(
    {
        "lightning.pytorch.Trainer",
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
        "rlhf_lightning.generation.local.Sampler",
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
STAGES = ("sft", "reward", "dpo", "ppo", "rloo", "grpo", "candidates", "evaluate", "audit")
RUN_ONLY = (
    "paths", "resume", "run_id", "run_folder", "name", "callbacks", "logger", "allow_targets", "objectives",
    "on_failed_trial", "plan",
)  # fmt: skip


def targets(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, target) for every `_target_` below `node`, a plain container."""
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
        node: configuration with a `_target_`; lists and dicts in it arrive as plain Python ones.
        key: where it stands in the configuration, for messages.
        allow: further exact names the user trusts.
        arguments: added to the call.

    Raises:
        UserError: a target that is not allowed, or arguments the target refuses.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as build

    plain = OmegaConf.to_container(node, resolve=True)
    allowed = ALLOWED | set(allow or [])
    given = {name: value for name, value in arguments.items() if isinstance(value, dict | list)}
    for where, target in [*targets(plain, key), *targets(given)]:  # Hydra builds what is nested in arguments, too
        if target not in allowed:
            raise UserError(
                f"{where}={target} is not an allowed target.{nearest(target, allowed)} To trust it, add "
                f"allow_targets=[{target}] on the command line"
            )
    try:
        return build(OmegaConf.create(plain), _convert_="all", **arguments)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"{key}: {str(cause or error).splitlines()[0]}") from error


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain containers with everything resolved."""
    found = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def identity(cfg: DictConfig) -> dict[str, Any]:
    """Return what decides a run's result: the configuration without where it writes and what it is called."""
    found = {key: value for key, value in plain(cfg).items() if key not in RUN_ONLY}
    found["data"] = {key: value for key, value in found["data"].items() if key not in ("cache_dir", "workers")}
    return found


def parents(cfg: DictConfig, start: str | None) -> list[tuple[str, str]]:
    """Return (role, folder) of the models this stage starts from; a tiny model, made on the spot, is none."""
    settings = plain(cfg)
    rewards = settings["reward_from"]
    found = [("init", start), *(("reward", r) for r in (rewards if isinstance(rewards, list) else [rewards]))]
    if cfg.stage == "evaluate":
        found += settings["evaluate"]["models"].items()
    return [(role, str(place)) for role, place in found if place and (role == "init" or Path(str(place)).is_dir())]


def code_keys(cfg: DictConfig) -> dict[str, str]:
    """Return a digest of every reward that is a function: a run goes on with what it began with."""
    settings = plain(cfg)
    rewards = settings["reward_from"]
    specs = [*(rewards if isinstance(rewards, list) else [rewards]), settings.get("gold_from")]
    return {str(spec): key for spec in specs if spec and (key := code_key(spec))}


def data_keys(cfg: DictConfig) -> dict[str, str]:
    """Return the content key of every data set the stage reads."""
    from rlhf_lightning.data.sources import read_source

    settings = plain(cfg)
    sources = {name: settings["data"].get(name) for name in ("train", "val", "ptx")}
    sources["preferences"] = settings["evaluate"]["preferences"] if cfg.stage == "evaluate" else None
    splits = {"train": "train", "val": "val", "ptx": "train", "preferences": "val"}
    windows = settings["data"].get("window") is not None
    return {
        name: read_source(s, splits[name], name=name, stream=windows and name == "train").key
        for name, s in sources.items()
        if s is not None
    }


def audited_data(cfg: DictConfig, choice: str) -> DictConfig:
    """Return the data module of an audit, which the choice of `data` decides: data=prompts/jsonl holds prompts."""
    kind = choice.partition("/")[0]
    if kind == "world":
        kind = cfg.data.world.records or "preferences"
    targets = {"demonstrations": "DemonstrationData", "preferences": "PreferenceData", "prompts": "PromptData"}
    if kind not in targets:
        raise UserError(f"stage=audit reads {', '.join(targets)}; data.world.records={kind} is none of them")
    node = {**plain(cfg)["data"], "_target_": f"rlhf_lightning.data.datamodules.{targets[kind]}"}
    return OmegaConf.create(node)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as {"a.b": value}."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def require(cfg: DictConfig) -> None:
    """Raise a UserError that names every mandatory key without a value."""
    missing = sorted(k for k in OmegaConf.missing_keys(cfg) if not k.startswith("hydra"))
    if missing:
        raise UserError(f"{', '.join(missing)}: a value is needed, for example {missing[0]}=<value>")


def check_types(cfg: DictConfig, overrides: list[str]) -> None:
    """Raise a UserError when the command line puts a text where the configuration has a number or a truth value."""
    from hydra import compose

    known = groups()
    keys = {o.partition("=")[0] for o in overrides if "=" in o} - {*known, "trainer.devices"}  # also "auto" and lists
    given = {
        k: OmegaConf.select(cfg, k, throw_on_missing=False) for k in keys if not k.startswith(("+", "~", "hydra."))
    }
    texts = {key: value for key, value in given.items() if isinstance(value, str)}
    if not texts:
        return
    defaults = compose("rlhf", overrides=[o for o in overrides if o.partition("=")[0] in known])
    for key, value in sorted(texts.items()):
        default = OmegaConf.select(defaults, key, throw_on_missing=False)
        if isinstance(default, int | float):
            kind = "true or false" if isinstance(default, bool) else "a number"
            raise UserError(f"{key}={value!r} is not {kind}; its default is {default}")


def conf_folder() -> Path:
    """Return the folder of the shipped configuration tree."""
    import importlib.resources

    return Path(str(importlib.resources.files("rlhf_lightning.conf")))


def groups() -> dict[str, list[str]]:
    """Return the options of every configuration group."""
    found: dict[str, list[str]] = {}
    root = conf_folder()
    for file in sorted(root.rglob("*.yaml")):
        parent, *rest = file.relative_to(root).with_suffix("").parts
        if rest and parent != "hydra":
            found.setdefault(parent, []).append("/".join(rest))
    return found


def explain(error: Exception, overrides: list[str]) -> str:
    """Return one readable line for a Hydra or OmegaConf error."""
    text = str(error)
    if found := re.search(r"Could not find '([\w./-]+)'", text):
        group, _, option = found[1].partition("/")
        options = groups().get(group, [])
        if options:
            return f"{group}={option} is not one of: {', '.join(options)}.{nearest(option, options)}"
    if found := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(found[1], overrides)
    if found := re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", text):
        return _unknown_key(found[2], overrides)
    lines = [line.strip() for line in text.splitlines() if line.strip() and "object_type" not in line]
    return " ".join(lines[:3]) or type(error).__name__


def _unknown_key(key: str, overrides: list[str]) -> str:
    """Say which keys exist beside an unknown one, by composing without the value overrides."""
    from hydra import compose, initialize_config_module

    known = groups()
    chosen = [o for o in overrides if o.partition("=")[0] in known]
    GlobalHydra.instance().clear()
    with initialize_config_module("rlhf_lightning.conf", version_base="1.3"):
        node: Any = compose("rlhf", overrides=chosen)
    every = list(flat(OmegaConf.to_container(node)))
    parent, _, name = key.rpartition(".")
    for part in filter(None, parent.split(".")):
        node = OmegaConf.select(node, part, throw_on_missing=False) if isinstance(node, DictConfig) else None
    if isinstance(node, DictConfig) and not node:
        return f"{parent} has no key {name} yet; add it with +{key}=<value>"
    if not isinstance(node, DictConfig):
        return f"there is no key {key}: nothing here has {parent}.*{_where(key, parent)}"
    options = [str(k) for k in node]
    same = [full for full in every if full.endswith(f".{name}")]
    hint = f" Did you mean '{same[0]}'?" if same else nearest(name, options)
    place = f"{parent} has the keys" if parent else "there are"
    return f"there is no key {key}.{hint} {place}: {', '.join(sorted(options))}"


def _where(key: str, parent: str) -> str:
    """Say what brings the missing parent of a key into the configuration."""
    root = parent.partition(".")[0]
    if root in STAGES:
        return f". It belongs to stage={root}; in a pipeline give +pipeline.stages.{root}.set.{key}=<value>"
    if root == "pipeline":
        return f"; a key the file does not set yet needs a plus: +{key}=<value>"
    options = [option for option in groups().get(root, []) if option != "none"]
    return f"; choose {root}= one of {', '.join(options)}" if options else ""
