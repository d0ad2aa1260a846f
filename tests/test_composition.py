"""What Hydra may build, and what only the command line may say; tests/test_hostile.py has what is refused."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from rlhf_lightning.errors import UserError
from rlhf_lightning.runtime.composition import LOGGING_CLASSES, TARGETS, guard


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", ConfigLoaderImpl.load_configuration)
    guard()
    guard()  # once is enough


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("rlhf_lightning.conf", version_base="1.3"):
        return compose("rlhf", overrides=list(overrides), return_hydra_config=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["stage=sft"],
        ["sweep=dpo_beta", "hydra/launcher=joblib", "hydra.launcher.n_jobs=4"],
        ["sweep=ppo_frontier"],
        ["stage=sft", "hydra/launcher=submitit_slurm", "hydra.launcher.setup=[module load x]"],
        ["stage=sft", "+hydra.job.env_set.OMP_NUM_THREADS=2"],
        ["stage=sft", "name=\\${x}", "data.train=${name}"],
        [
            "stage=sft",
            "hydra.job_logging.handlers.file.filename=${hydra.runtime.output_dir}/mine/${hydra.job.name}.log",
        ],
        ["stage=sft", "hydra/job_logging=none", "hydra.output_subdir=null"],
        ["stage=sft", "+hydra.callbacks.x._target_=my.Callback", "allow_targets=[my.Callback]"],
    ],
)
def test_what_is_usual_composes(overrides: list[str], guarded: None) -> None:
    cfg = composed(*overrides)
    recorded = OmegaConf.to_container(cfg.hydra.overrides, resolve=False)
    assert sorted(recorded["hydra"] + recorded["task"]) == sorted(overrides)  # type: ignore[index, call-overload]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=sft", "+hydra.callbacks.x._target_=my.Callback"], "my.Callback is not an allowed target"),
        (["stage=sft", "allow_targets=[a.B]", "+hydra.callbacks.x._target_=my.Callback"], "is not an allowed target"),
        (["stage=sft", "hydra.job_logging.root.handlers=null", "hydra.job.name=../x"], "below the run folder"),
        (["stage=sft", "hydra.job_logging.handlers.file.filename=x.log"], "below the run folder"),
        (["sweep=dpo_beta", "+hydra.sweeper.params.allow_targets=a.B"], "cannot be swept"),
    ],
)
def test_what_is_not_is_refused(overrides: list[str], message: str, guarded: None) -> None:
    with pytest.raises(UserError, match=message):
        composed(*overrides)


@pytest.mark.slow
def test_a_copied_variable_is_not_written(guarded: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MY_TOKEN", "hunter2")
        cfg = composed("stage=sft", "+hydra.job.env_copy=[MY_TOKEN]")
        assert "hunter2" not in OmegaConf.to_yaml(cfg)
        assert cfg.hydra.job.env_set.MY_TOKEN == "hunter2"


def test_every_name_of_ours_exists() -> None:
    for name in [*LOGGING_CLASSES, *TARGETS]:
        if not name.startswith(("colorlog.", "hydra_plugins.", "optuna.")):  # extras
            assert callable(get_object(name)), name
