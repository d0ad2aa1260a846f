"""A run: one stage with its settings, its run folder, where it starts from, and what decides its result."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rlhf_lightning.data.base import RowData
from rlhf_lightning.data.datamodules import KINDS
from rlhf_lightning.data.sources import Source, read_source
from rlhf_lightning.errors import UserError
from rlhf_lightning.files import fingerprint
from rlhf_lightning.judges import table as judges
from rlhf_lightning.judges.constitution import constitution_digests
from rlhf_lightning.models.folder import parent_entry
from rlhf_lightning.models.loading import context_length, load_tokenizer, resolve_model
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.rewards import spec
from rlhf_lightning.rewards.scoring import Reward, load_reward
from rlhf_lightning.runtime.arguments import own_arguments
from rlhf_lightning.runtime.instantiate import allowed_targets, check_targets, instantiate, resolve
from rlhf_lightning.runtime.launch import decide_run
from rlhf_lightning.runtime.settings import (
    DATA_SPLITS,
    check_names,
    flat,
    identity,
    lower_is_better,
    named,
    select,
    task_overrides,
    to_container,
)
from rlhf_lightning.runtime.stage import Stage

ROW_TOKENS = {"cpu": 1024, "cuda": 8192}
"""What data.row_tokens=null means by device."""
ROWS_READ_FOR_TOKENIZER = 20_000


def starting_point(settings: dict[str, Any], convert: bool = True) -> str | None:
    """Return the model folder or hub name a stage starts from, None where a tiny model is to be built.

    `init_from` comes before `model`; both take a folder, a GGUF file, a hub name or a name of ours. Without `convert` a
    GGUF file is returned as it is.
    """
    name = settings["init_from"] or settings["model"]["name"]
    if name == "tiny":
        return None
    return resolve_model(str(name), settings["paths"]["cache"], convert)


class Run:
    """One stage of a composed configuration.

    Args:
        stage: the row of the table.
        cfg: the composed configuration.
        folder: the folder Hydra made for this start.

    Raises:
        UserError: a model, a reward or a data source that does not exist.
    """

    def __init__(self, stage: Stage, cfg: DictConfig, folder: Path) -> None:
        self.stage, self.cfg, self.folder = stage, cfg, folder
        self.settings = to_container(cfg)
        if (ensemble := self.settings["reward_ensemble"]) != "mean" and not self.settings["reward_from"]:
            raise UserError(f"reward_ensemble={ensemble} needs reward_from=[<reward>,<reward>,...]")
        self.allow = list(cfg.allow_targets)
        self.start = starting_point(self.settings)
        self.checkpoint: Path | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The settings of the stage itself."""
        return dict(self.settings[self.stage.name])

    @property
    def device(self) -> str:
        """Where a stage without a Trainer computes, from the trainer's accelerator."""
        import torch

        use_gpu = self.settings["trainer"]["accelerator"] in ("gpu", "cuda")
        return "cuda" if use_gpu and torch.cuda.is_available() else "cpu"

    @cached_property
    def judge(self) -> dict[str, Any] | None:
        """The settings of the judge with its models resolved; None where this run asks none."""
        rewards = [self.settings["reward_from"], self.settings.get("gold_from")]
        settings = self.settings["judge"]
        if not settings or not (self.stage.judges or any(spec.judges(value) for value in rewards)):
            return None
        return judges.with_models(settings, lambda name: resolve_model(name, self.settings["paths"]["cache"]))

    # ---- identity --------------------------------------------------------------------------------------------------

    @cached_property
    def sources(self) -> dict[str, Source]:
        """Every data source of the run by its key; each is read and digested here, and nowhere else."""
        data = self.settings["data"]
        target = data.get("_target_")
        kind = getattr(self.data_class(target), "kind", None) if target else ""
        world = {"seed": data.get("seed", self.settings["seed"])} | (data.get("world") or {})
        sources: dict[str, Source] = {}
        splits = {**(DATA_SPLITS if kind is not None else {}), **self.stage.sources}  # another's keys are its own
        for place, split in splits.items():
            given = select(self.settings, place)
            for key, value in named(place, given) if given is not None else ():
                name = key.removeprefix("data.")
                rows = {"data.ptx": "demonstrations"}.get(key, str(kind) if key in DATA_SPLITS else "preferences")
                stream = split == "train" and data.get("window") is not None
                options = world if key in ("data.train", "data.val") else world | {"records": None}
                limit = None if key == "data.ptx" else data.get(f"{split}_rows")
                weights = data.get("weights") if key == "data.train" else None
                sources[key] = read_source(value, split, limit, rows, options, name, stream, weights)
        return sources

    @cached_property
    def parents(self) -> list[tuple[str, str]]:
        """(role, folder) of every model that this run starts from; a tiny model, built by this run, is none."""
        models = [("init", self.start)] if self.start else []
        models += [("reward", reward.name) for reward in spec.parse(self.settings["reward_from"]) if reward.is_model]
        models += [("judge", model) for model in judges.models(self.judge)]
        for key in self.stage.models:
            value = select(self.settings, key)
            models += flat(value).items() if isinstance(value, dict) else [(key.rpartition(".")[2], value)]
        return [(role, str(place)) for role, place in models if place]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the result: configuration, models, data and rewards by content."""
        rewards = [self.settings["reward_from"], self.settings.get("gold_from")]
        config = identity(self.settings | {"judge": self.judge})
        constitutions = constitution_digests(flat(config))
        return {
            "config": config,
            "parents": [parent_entry(*parent)["weights"] for parent in self.parents],
            "data": {key: source.key for key, source in self.sources.items()},
            "rewards": [spec.digests(value) for value in rewards],
        } | ({"constitutions": constitutions} if constitutions else {})

    def decide(self) -> dict[str, Any] | None:
        """Decide the run folder and the checkpoint to resume from; return the metrics of a run that is done."""
        self.folder, self.checkpoint, finished = decide_run(
            self.folder,
            self.stage.name,
            self.stage.output,
            self.settings["resume"] and str(self.settings["resume"]),
            fingerprint(self.identity),
        )
        self.cfg.paths.run = str(self.folder)
        self.settings = to_container(self.cfg)
        return finished

    # ---- building --------------------------------------------------------------------------------------------------

    def named_models(self) -> dict[str, str]:
        """Return name -> folder of the models that a stage compares: `<stage>.models`, and `init_from` as "model".

        Raises:
            UserError: a name that cannot be, or that stands for two models.
        """
        key, given = f"{self.stage.name}.models", self.options["models"]
        check_names(key, given)
        alone = self.settings["init_from"] or not given  # `model=` may be what a pipeline began with
        models = {"model": self.start} if self.start and alone else {}
        if twice := models.keys() & given.keys():
            raise UserError(f"{key}.{min(twice)}: this is the name of init_from; choose another")
        cache = self.settings["paths"]["cache"]
        return models | {str(name): resolve_model(str(folder), cache) for name, folder in given.items()}

    def build(self, key: str, **arguments: Any) -> Any:
        """Return what the configuration's `key` names, see :func:`instantiate` and :func:`own_arguments`.

        A value without a `_target_`, as of several loggers, is built member by member.
        """
        settings = select(self.settings, key)
        if isinstance(settings, dict) and "_target_" in settings:
            check_targets(settings, key, {*allowed_targets(), *self.allow})
            if HydraConfig.initialized():  # else there was no command, and there are no overrides
                choice = HydraConfig.get().runtime.choices.get(key) if "." not in key else None
                given = {o.partition("=")[0].lstrip("+") for o in task_overrides()}
                settings = own_arguments(settings, key, choice, given)
        return instantiate(settings, key, self.allow, **arguments)

    def start_folder(self) -> str:
        """Return the model the stage starts from; a tiny one and its tokenizer are built from the training texts."""
        if self.start is not None:
            return self.start
        if self.stage.needs_start:
            raise UserError(f"stage={self.stage.name} needs a model to start from: init_from=<folder or hub name>")
        from rlhf_lightning.data.sources import texts_of

        settings, data = self.settings, self.settings["data"]
        stream = data.get("window") is not None
        given = data["train"] if isinstance(data["train"], list) else [data["train"]]
        kinds = ["corpus", "demonstrations"] if "world" in given else [""]
        world = {"seed": settings["seed"]} | (data.get("world") or {}) | {"records": None}
        sources = [
            read_source(data["train"], "train", ROWS_READ_FOR_TOKENIZER, kind, world, stream=stream) for kind in kinds
        ]
        build = settings["model"]["build"]
        key = fingerprint([*(source.key for source in sources), build["vocab_size"], version("tokenizers")])
        return build_tiny(
            self.folder / "init",
            lambda: (text for source in sources for _, row in source.rows() for text in texts_of(row)),
            seed=settings["seed"],
            cache=None if stream else Path(settings["paths"]["cache"], "tokenizers", key),
            **build,
        )

    def data(self, folder: str, instead: dict[str, Any] | None = None, rows: bool = False, **arguments: Any) -> Any:
        """Return the data module, with the tokenizer of a model folder.

        One of ours, or a subclass, is cut to the tokens that the model can read and gets the sources of this run;
        another LightningDataModule gets what its constructor takes.

        Args:
            instead: settings in place of the configuration's `data`.
            rows: the stage reads rows, which only ours have.
            arguments: added to the call, or in place of what the configuration says.

        Raises:
            UserError: a data module that cannot be imported, or has no rows where they are needed.
        """
        settings: dict[str, Any] = instead or self.settings["data"]
        kind, tokenizer = self.data_class(str(settings["_target_"])), load_tokenizer(folder)
        if issubclass(kind, RowData):
            sources = {key.removeprefix("data."): source for key, source in self.sources.items() if key in DATA_SPLITS}
            given = {"tokenizer": tokenizer, "context": context_length(folder)} | sources | arguments
            if settings.get("row_tokens", 0) is None:
                given.setdefault("row_tokens", ROW_TOKENS[self.device])
            return instantiate(settings, "data", self.allow, **given)
        if rows:
            raise UserError(f"stage={self.stage.name} reads rows: data._target_={settings['_target_']} is no RowData")
        parameters = inspect.signature(kind).parameters
        accepted = {key: value for key, value in settings.items() if key in parameters or key == "_target_"}
        given = {"tokenizer": tokenizer} if "tokenizer" in parameters else {}
        return instantiate(accepted, "data", self.allow, **given)

    def data_class(self, target: str) -> type:
        """Return the class of a data module, which must be allowed."""
        if target not in KINDS and target not in self.allow:
            check_targets({"_target_": target}, "data", KINDS.keys() | set(self.allow))  # raises, with what to do
        return resolve(target, "data")

    def module(self, load: Callable[[], Any], **options: Any) -> Any:
        """Return the stage's LightningModule; models are loaded later, by its `configure_model`."""
        return self.build(
            "module",
            load=load,
            optimizer=self.build("optimizer"),
            schedule=self.build("schedule") if self.settings["schedule"] else None,
            lora=self.settings["adapter"],
            **options,
        )

    def loggers(self) -> list[Any]:
        """Return the loggers of the configuration: none, one, or those of a map or list."""
        node = self.settings["logger"] or []
        if isinstance(node, dict) and "_target_" in node:
            return [self.build("logger")]
        members = node.items() if isinstance(node, dict) else enumerate(node)
        return [instantiate(member, f"logger.{name}", self.allow) for name, member in members if member]

    def callbacks(self) -> list[Any]:
        """Return the callbacks of the configuration, a map; a `mode` that is null follows from the monitored metric."""
        node = self.settings["callbacks"] or {}
        if not isinstance(node, dict):
            raise UserError("callbacks is a map of names to callbacks: callbacks.<name>._target_=<class>")
        for name, member in node.items():
            if member and "_target_" not in member:
                raise UserError(
                    f"callbacks.{name} has no _target_: add +callbacks.{name}._target_=<class>, or leave it out"
                )
            if member and "mode" in member and member["mode"] is None and "monitor" in member:
                member["mode"] = "min" if lower_is_better(str(member["monitor"])) else "max"
        return [self.build(f"callbacks.{name}") for name, member in node.items() if member]

    def reward(self, key: str) -> Reward | None:
        """Return the reward that `reward_from` or `gold_from` names, None where it names none."""
        value = self.settings.get(key)
        trained_on = key == "reward_from"
        dtype = self.settings["model"]["load"]["dtype"] if trained_on else "float32"
        how = self.settings["reward_groups"] if trained_on else "mean"
        none = self.settings["reward_none"] if trained_on else "error"
        ensemble = self.settings["reward_ensemble"] if trained_on else "mean"
        settings = self.settings | {"judge": self.judge}
        return load_reward(value, dtype, how, none, settings, ensemble) if spec.parse(value, key) else None
