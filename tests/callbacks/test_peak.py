"""callbacks=peak and callbacks=models: where a run stops, what it keeps, and what it writes on the way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from rlhf_lightning.callbacks.models import ModelFolders
from rlhf_lightning.callbacks.smoothed import Smoothed
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.folder import read_manifest
from rlhf_lightning.models.loading import load_causal_lm
from tests.helpers.compose import composed
from tests.helpers.lightning import quiet_lightning
from tests.modules import bandit


def trainer(metrics: dict[str, float], fn: TrainerFn = TrainerFn.FITTING, sanity_checking: bool = False) -> Any:
    values = {name: torch.tensor(value) for name, value in metrics.items()}
    return SimpleNamespace(callback_metrics=values, state=SimpleNamespace(fn=fn), sanity_checking=sanity_checking)


def test_the_mean_is_over_the_last_validations_of_the_fit() -> None:
    smoothed, means = Smoothed("val/gold", window=2), []
    for value in (1.0, 3.0, 8.0):
        now = trainer({"val/gold": value})
        smoothed.on_validation_end(now, None)  # type: ignore[arg-type]
        means.append(now.callback_metrics["val/gold_smoothed"].item())
    assert means == [1.0, 2.0, 5.5]
    for now in (trainer({"val/gold": 9.0}, sanity_checking=True), trainer({"val/gold": 9.0}, TrainerFn.VALIDATING)):
        smoothed.on_validation_end(now, None)  # type: ignore[arg-type]
        assert "val/gold_smoothed" not in now.callback_metrics
    resumed = Smoothed("val/gold", window=2)
    resumed.load_state_dict(smoothed.state_dict())
    assert list(resumed.values) == [3.0, 8.0]


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"val/glod is not logged in validation; .*Did you mean 'val/gold'"):
        Smoothed("val/glod").on_validation_end(trainer({"val/gold": 0.0}), None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"callbacks\.smoothed\.window=0"):
        Smoothed("val/gold", window=0)
    with pytest.raises(UserError, match=r"callbacks\.models\.every_n_steps=0"):
        ModelFolders(tmp_path, 0, "ppo")


def test_the_mean_is_there_before_it_is_read() -> None:
    names = list(composed("stage=ppo", "callbacks=peak").callbacks)
    assert names.index("smoothed") < names.index("early_stopping") < names.index("best")


# ---- planted overoptimization --------------------------------------------------------------------------------------


def gold(prompts: Any, responses: list[str], metadata: Any) -> list[float]:
    """Best where half of the tokens are the good one."""
    return [1 - 4 * (share - 0.5) ** 2 for share in bandit.good_share(prompts, responses, metadata)]


def bonus(prompts: Any, responses: list[str], metadata: Any) -> list[float]:
    """The gold reward and a bonus for every good token, however many there are."""
    shares = bandit.good_share(prompts, responses, metadata)
    return [value + 4 * share for value, share in zip(gold(prompts, responses, metadata), shares, strict=True)]


class Validations(bandit.History):
    """Keeps the gold reward of every validation."""

    def __init__(self) -> None:
        super().__init__()
        self.gold: list[float] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.gold.append(float(trainer.callback_metrics["val/gold"]))


def run(reward: Any, folder: Path, stop: bool, iterations: int = 16) -> tuple[list[float], float]:
    """Return the gold reward of every validation, and that of the checkpoint that was kept."""
    seen = Validations()
    early = EarlyStopping("val/gold_smoothed", mode="max", patience=4, check_on_train_epoch_end=False)
    best = ModelCheckpoint(folder, monitor="val/gold_smoothed", mode="max", save_on_train_epoch_end=False)
    module = bandit.build(reward=reward, gold=gold, kl_beta=0.0, lr=1e-2)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[seen, Smoothed("val/gold"), *([early] if stop else []), best],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=1,
    )  # fmt: skip
    trainer.fit(module, bandit.Prompts(iterations, size=32, val=True))
    kept = torch.load(best.best_model_path, weights_only=True)["global_step"]
    return seen.gold, seen.gold[kept * len(seen.gold) // trainer.global_step - 1]


@pytest.mark.slow
@quiet_lightning
def test_a_bonus_is_stopped_at_the_peak_of_gold(tmp_path: Path) -> None:
    whole, _ = run(bonus, tmp_path / "whole", stop=False)
    stopped, kept = run(bonus, tmp_path / "stopped", stop=True)
    top = max(whole)
    assert whole[-1] < top - 0.4  # without it gold falls
    assert stopped == whole[: len(stopped)]
    assert len(stopped) < len(whole)
    assert kept > top - 0.1


@pytest.mark.slow
@quiet_lightning
def test_gold_itself_as_the_proxy_has_no_peak(tmp_path: Path) -> None:
    whole, kept = run(gold, tmp_path, stop=False, iterations=30)
    assert whole[-1] > max(whole) - 0.1
    assert kept > max(whole) - 0.1


# ---- models on the way ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@quiet_lightning
def test_models_are_those_of_their_steps(tmp_path: Path) -> None:
    """Two updates an iteration: after the second iteration there are four, and the run itself is as without it."""

    class Tokenizer:
        chat_template = None

        def save_pretrained(self, folder: Path) -> None:
            pass

    def trained(iterations: int, *callbacks: Any) -> Any:
        data: Any = bandit.Prompts(iterations)
        data.tokenizer = Tokenizer()
        module = bandit.build(ppo_epochs=1, num_minibatches=2)
        bandit.fit(module, data, callbacks=list(callbacks))
        return module

    every = ModelFolders(tmp_path, 4, "ppo")
    module, short, plain = trained(5, every), trained(2), trained(5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000004", "step_000008"]
    manifest = read_manifest(tmp_path / "step_000004") or {}
    assert (manifest["stage"], manifest["metrics"]) == ("ppo", {"global_step": 4})
    written = load_causal_lm(str(tmp_path / "step_000004"))
    for name, weight in short.policy.lm.state_dict().items():
        assert torch.equal(written.state_dict()[name], weight), name
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
