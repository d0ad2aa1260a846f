"""Every configuration file composes, names only allowed targets, and binds to what it configures."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf

from rlhf_lightning.errors import UserError
from rlhf_lightning.runtime import config
from tests.helpers.compose import composed

ROOT = Path(__file__).parents[1]
FILES = sorted(str(f.relative_to(ROOT / "conf").with_suffix("")) for f in (ROOT / "conf").rglob("*.yaml"))


def choice(file: str) -> list[str]:
    group, _, option = file.rpartition("/")
    return [] if not group or group == "hydra" else [f"{group}={option}"]


@pytest.mark.parametrize("file", [f for f in FILES if not f.startswith("data/")])
def test_every_file_composes_and_binds(file: str) -> None:
    stage = [] if file.startswith(("stage/", "pipeline/", "experiment/", "sweep/")) else ["stage=sft"]
    cfg = composed(*stage, *choice(file))
    for key, target in config.targets(OmegaConf.to_container(cfg), ""):
        assert target in config.ALLOWED, key
        node = OmegaConf.select(cfg, key.rpartition(".")[0])
        given = {k for k in node if not str(k).startswith("_")}
        accepted = parameters(get_object(target))
        assert given <= accepted, f"{key}: {given - accepted}"


@pytest.mark.parametrize("stage", config.STAGES)
def test_stage_hyperparameters_are_the_modules(stage: str) -> None:
    cfg = composed(f"stage={stage}")
    if stage in ("evaluate", "audit"):
        folder = {"evaluate": "evaluation"}.get(stage, stage)
        files = [ROOT / "rlhf_lightning" / "run.py", *(ROOT / "rlhf_lightning" / folder).glob("*.py")]
        used = "".join(file.read_text() for file in files)
        assert all(f'"{key}"' in used for key in cfg[stage])
        return
    accepted = parameters(get_object(cfg.module._target_))
    given = set(cfg[stage]) - {"critic"}  # run.py turns it into load_critic
    assert given <= accepted, given - accepted
    data = parameters(get_object(cfg.data._target_))
    assert {k for k in cfg.data if k != "_target_"} <= data
    world = composed(f"stage={stage}", "data=world")
    assert {k for k in world.data if k != "_target_"} <= data | {"turns"}


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
                config.instantiate(
                    OmegaConf.create({"_target_": "torch.optim.AdamW", "_partial_": True, "x": node}), "key"
                )
    assert not marker.exists()


def test_targets_inside_arguments_are_checked_as_well() -> None:
    node = OmegaConf.create({"_target_": "torch.optim.AdamW", "_partial_": True})
    with pytest.raises(UserError, match=r"lora\.alpha\._target_=torch\.load is not an allowed target"):
        config.instantiate(node, "module", lora={"alpha": {"_target_": "torch.load", "f": "x"}})


def test_every_allowed_target_exists() -> None:
    for name in config.ALLOWED:
        assert callable(get_object(name)), name


FORBIDDEN = {
    "ops": {"lightning", "transformers", "hydra", "omegaconf", "datasets", "peft", "rlhf_lightning"},
    "world": {"torch", "lightning", "transformers", "hydra", "omegaconf"},
    "data": {"hydra", "omegaconf"},
    "models": {"hydra", "omegaconf", "lightning"},
    "modules": {"hydra", "omegaconf"},
    "callbacks": {"hydra", "omegaconf"},
}
ABOVE = {
    "ops": ["data", "models", "modules", "callbacks", "evaluation", "world", "run", "pipeline", "config", "artifacts"],
    "world": ["data", "models", "modules", "callbacks", "evaluation", "run", "pipeline", "config", "artifacts", "ops"],
    "data": ["modules", "callbacks", "evaluation", "run", "pipeline", "config"],
    "models": ["modules", "callbacks", "evaluation", "run", "pipeline", "config"],
    "modules": ["callbacks", "evaluation", "run", "pipeline", "config"],
    "callbacks": ["evaluation", "run", "pipeline", "config"],
    "evaluation": ["run", "pipeline"],
    "preferences": ["run", "pipeline", "config"],
}


@pytest.mark.parametrize("package", ABOVE)
def test_imports_point_downwards(package: str) -> None:
    for file in (ROOT / "rlhf_lightning" / package).rglob("*.py"):
        for name in imported(file):
            top, *rest = name.split(".")
            if top == "rlhf_lightning" and rest:
                assert rest[0] not in ABOVE[package], f"{file.name} imports {name}"
            else:
                assert top not in FORBIDDEN.get(package, set()) - {"rlhf_lightning"}, f"{file.name} imports {name}"
            assert top != "pytorch_lightning"


def imported(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def test_files_stay_small() -> None:
    for file in (ROOT / "rlhf_lightning").rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 330, file
