"""Every configuration file composes, names only allowed targets, and binds to what it configures."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_object
from lightning.pytorch.callbacks import EarlyStopping
from omegaconf import OmegaConf

from rlhf_lightning.errors import UserError
from rlhf_lightning.judges.table import JUDGES
from rlhf_lightning.runtime.arguments import own_arguments
from rlhf_lightning.runtime.explain import RENAMED, explain
from rlhf_lightning.runtime.instantiate import EXTRAS, allowed_targets, instantiate, public_classes, targets
from rlhf_lightning.runtime.settings import check_names, groups
from rlhf_lightning.stages import STAGES
from tests.helpers.compose import composed

ROOT = Path(__file__).parents[1]
FILES = sorted(
    str(f.relative_to(ROOT / "conf").with_suffix(""))
    for f in (ROOT / "conf").rglob("*.yaml")
    if not f.name.startswith("_")  # parts of other files
)


def choice(file: str) -> list[str]:
    group, _, option = file.rpartition("/")
    return [] if not group or group == "hydra" else [f"{group}={option}"]


@pytest.mark.slow
@pytest.mark.parametrize("file", [f for f in FILES if not f.startswith("data/")])
def test_every_file_composes_and_binds(file: str) -> None:
    stage = [] if file.startswith(("stage/", "pipeline/", "experiment/", "sweep/")) else ["stage=sft"]
    cfg = composed(*stage, *choice(file))
    for key, target in targets(OmegaConf.to_container(cfg), ""):
        assert target in allowed_targets(), key
        if absent(target):
            continue
        node = OmegaConf.select(cfg, key.rpartition(".")[0])
        given = {k for k in node if not str(k).startswith("_")}
        accepted = parameters(get_object(target))
        assert given <= accepted, f"{key}: {given - accepted}"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_stage_hyperparameters_are_the_modules(stage: str) -> None:
    cfg = composed(f"stage={stage}")
    if "module" not in cfg:  # read by the stage's own file
        source = (ROOT / "rlhf_lightning" / "stages" / f"{stage}.py").read_text()
        elsewhere = {*STAGES[stage].models, *STAGES[stage].sources}
        assert all(f'options["{key}"]' in source or f"{stage}.{key}" in elsewhere for key in cfg[stage])
        return
    accepted = parameters(get_object(cfg.module._target_))
    given = set(cfg[stage]) - {"critic"}  # stages/online.py turns it into load_critic
    assert given <= accepted, given - accepted
    data = parameters(get_object(cfg.data._target_))
    assert {k for k in cfg.data if k != "_target_"} <= data
    world = composed(f"stage={stage}", "data=world")
    assert {k for k in world.data if k != "_target_"} <= data | {"turns"}


@pytest.mark.parametrize("name", JUDGES)
def test_settings_of_judges_are_those_of_what_makes_them(name: str) -> None:
    cfg = composed("stage=sft", f"judge={name}")
    assert cfg.judge.kind == name
    assert set(cfg.judge) - {"kind"} == parameters(JUDGES[name].load()) - {"self"}, name


def parameters(target: Any) -> set[str]:
    """Names a target takes, through **kwargs up its bases."""
    classes = target.__mro__ if inspect.isclass(target) else [target]
    found: set[str] = set()
    if target.__name__ == "DDPStrategy":  # hands what it does not know to torch
        found = parameters(torch.nn.parallel.DistributedDataParallel)
    for owner in classes:
        call = owner.__dict__.get("__init__") if inspect.isclass(owner) else owner
        if call is None:
            continue
        signature = inspect.signature(call).parameters.values()
        found |= {p.name for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in signature):
            break
    return found


def test_only_listed_targets_are_built(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for target, arguments in (
        ("os.system", [f"touch {marker}"]),
        ("torch.load", [str(marker)]),
        ("builtins.exec", [f"open({str(marker)!r}, 'w')"]),
        ("rlhf_lightning.callbacks.checkpoints.torch.load", [str(marker)]),
        ("torch.optim.adamw.sys.modules", []),
    ):
        for node in ({"_target_": target, "_args_": arguments}, {"a": [{"_target_": target, "_args_": arguments}]}):
            with pytest.raises(UserError, match="is not an allowed target"):
                instantiate({"_target_": "torch.optim.AdamW", "_partial_": True, "x": node}, "key")
    assert not marker.exists()


def test_targets_inside_arguments_are_not_built() -> None:
    node = {"_target_": "rlhf_lightning.modules.schedules.schedule", "_partial_": True}
    evil = {"_target_": "torch.load", "f": "x"}
    assert instantiate(node, "module", final=evil).keywords["final"] is evil


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "my-dpo", "ÄÖ 2", "beta=0.1", "a_b.c", 7])
def test_a_name_of_a_model_can_be_that_of_a_file(name: Any) -> None:
    check_names("evaluate.models", {name: "folder"})


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "[b]", "a\n", "a\u202eb", "a" * 101])
def test_what_no_file_or_tag_is_called_is_no_name(name: str) -> None:
    with pytest.raises(UserError, match=r"evaluate\.models: .* cannot be a name"):
        check_names("evaluate.models", {"good": "folder", name: "folder"})


def test_stages_are_rows_of_one_table() -> None:
    """A stage is a row, a file that runs it, and a file of its settings; no row is without."""
    assert list(STAGES) == [stage.name for stage in STAGES.values()]
    assert set(groups()["stage"]) == set(STAGES)
    for stage in STAGES.values():
        assert callable(stage.load())
        assert composed(f"stage={stage.name}").stage == stage.name


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_keys_are_refused_with_the_new_name(old: str, new: str) -> None:
    key = f"data.{old}" if old == "workers" else f"ppo.{old}"
    error = Exception(f"Could not override '{key}'.")
    assert explain(error, ["stage=ppo"]) == f"there is no key {key}: it is now {key.partition('.')[0]}.{new}"


def absent(target: str) -> bool:
    """Return whether a target belongs to an extra that is not installed."""
    package = target.partition(".")[0]
    return package in EXTRAS and importlib.util.find_spec(package) is None


def test_every_allowed_target_exists() -> None:
    for name in allowed_targets():
        assert absent(name) or callable(get_object(name)), name


def test_public_classes_are_listed_one_by_one() -> None:
    """What Lightning and torch publish, under both of its names; what lives beside it is not allowed."""
    classes = public_classes()
    assert classes["lightning.pytorch.callbacks.EarlyStopping"] is EarlyStopping
    assert classes["lightning.pytorch.callbacks.early_stopping.EarlyStopping"] is EarlyStopping
    assert {"torch.optim.RMSprop", "lightning.pytorch.loggers.WandbLogger"} <= classes.keys()
    for target in (
        "lightning.pytorch.callbacks.early_stopping.os.system",
        "lightning.pytorch.callbacks.model_checkpoint.torch.load",
        "lightning.pytorch.loggers.csv_logs.os",
        "torch.optim.lr_scheduler.LambdaLR",
        "torch.optim.adamw.torch.load",
    ):
        with pytest.raises(UserError, match="is not an allowed target"):
            instantiate({"_target_": target}, "key")


@pytest.mark.parametrize(("package", "extra"), [("bitsandbytes", "8bit"), ("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_missing_extra_is_named(package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = {
        "bitsandbytes": "bitsandbytes.optim.AdamW8bit",
        "wandb": "lightning.pytorch.loggers.WandbLogger",
        "mlflow": "lightning.pytorch.loggers.MLFlowLogger",
    }[package]
    if not absent(package):  # as if it were
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"key: {package} is not installed: pip install 'rlhf-lightning\[{extra}\]'"):
        instantiate({"_target_": target}, "key")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "given", "expected"),
    [
        ("torch.optim.AdamW", set(), {"lr", "betas", "eps", "weight_decay", "fused"}),
        ("torch.optim.SGD", set(), {"lr"}),
        ("torch.optim.RMSprop", {"optimizer.eps"}, {"lr", "eps"}),
        ("torch.optim.NAdam", {"optimizer.betas"}, {"lr", "betas"}),
    ],
)
def test_another_optimizer_is_not_given_what_was_written_for_adamw(target: str, given: set[str], expected: Any) -> None:
    settings = OmegaConf.to_container(composed("stage=sft", f"optimizer._target_={target}").optimizer)
    assert own_arguments(settings, "optimizer", "adamw", given).keys() - {"_target_", "_partial_"} == expected


def test_a_stage_adds_nothing_that_the_chosen_optimizer_does_not_take() -> None:
    settings: Any = OmegaConf.to_container(composed("stage=ppo", "optimizer=sgd").optimizer)
    assert "eps" in settings
    kept = own_arguments(settings, "optimizer", "sgd", set())
    assert kept.keys() - {"_target_", "_partial_"} == {"lr", "momentum", "weight_decay", "fused"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [name for name, stage in STAGES.items() if stage.trains])
def test_lora_learns_at_ten_times_the_rate(stage: str) -> None:
    """Schulman et al. 2025; the composed configuration shows it, and a rate that is given stays."""
    full, lora = composed(f"stage={stage}").optimizer.lr, composed(f"stage={stage}", "adapter=lora").optimizer.lr
    assert lora == pytest.approx(10 * full)
    assert composed(f"stage={stage}", "adapter=lora", "optimizer.lr=3e-5").optimizer.lr == 3e-5


@pytest.mark.slow
def test_an_experiment_keeps_its_rate_with_lora() -> None:
    assert (
        composed("experiment=dpo_world", "adapter=lora").optimizer.lr == composed("experiment=dpo_world").optimizer.lr
    )


def test_an_iteration_has_64_responses() -> None:
    sizes = {stage: composed(f"stage={stage}") for stage in ("ppo", "rloo", "grpo", "online_dpo")}
    assert {cfg.data.batch_size * cfg[stage].num_generations for stage, cfg in sizes.items()} == {64}


def test_rloo_does_not_whiten_over_tokens() -> None:
    assert composed("stage=rloo").rloo.whiten_advantages is False
