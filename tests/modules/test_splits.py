"""A step is the same step however it is split: 1 x 8 rows, 8 x 1, or two ranks with 4 each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rlhf_lightning import DPO, SFT, DemonstrationData, PreferenceData, RewardModel
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer
from tests.helpers.lightning import quiet_lightning
from tests.modules.bandit import KeepWeights
from tests.modules.offline import fit, sgd, start

# unequal lengths: a mean of the microbatches' means would differ in the second digit
ROWS = [
    {"prompt": "say red", "chosen": "gold " * n, "rejected": "ruby", "margin": 0.1 * n, "label": 1 - 0.05 * n}
    | {"group": "old" if n < 4 else "young" if n < 8 else None}
    for n in (1, 9, 2, 7, 3, 6, 8, 4)
]  # fmt: skip
STAGES: dict[str, tuple[Callable[..., Any], Callable[..., Any], type[Any], dict[str, Any]]] = {
    "sft": (SFT, load_causal_lm, DemonstrationData, {}),
    "reward": (RewardModel, load_scalar_model, PreferenceData, {}),
    "grouped": (RewardModel, load_scalar_model, PreferenceData, {"groups": ["old", "young"]}),
    "dpo": (DPO, load_causal_lm, PreferenceData, {"beta": 0.5, "sft_coef": 0.1}),
}


def learned(stage: str, folder: str, tmp_path: Path, accumulate: int = 1, ranks: int = 1) -> dict[str, Tensor]:
    """Return how far one step of plain gradient descent moved each weight, in float64."""
    make, load, data_module, options = STAGES[stage]
    data = data_module(load_tokenizer(folder), ROWS, batch_size=8, cache_dir=tmp_path)
    module = make(partial(load, folder, dtype="float64"), sgd(1.0), **options)
    kept = tmp_path / f"{stage}-{accumulate}-{ranks}.pt"
    more = {"devices": 2, "strategy": "ddp_fork"} if ranks > 1 else {}
    fit(module, data, 1, accumulate, callbacks=[KeepWeights(kept)], **more)
    after = torch.load(kept, weights_only=True)
    before = make(partial(load, folder, dtype="float64"), sgd())
    before.configure_model()
    return {name: after[name] - weight for name, weight in before.state_dict().items()}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@quiet_lightning
def test_any_split_of_the_step_is_the_same_step(tmp_path: Path, stage: str) -> None:
    folder = start(tmp_path)
    whole = learned(stage, folder, tmp_path)
    moved = torch.cat([change.flatten() for change in whole.values()]).norm()
    assert moved > 0.1
    for accumulate, ranks in ((2, 1), (8, 1), (1, 2), (4, 2)):
        other = learned(stage, folder, tmp_path, accumulate, ranks)
        apart = torch.cat([(other[name] - change).flatten() for name, change in whole.items()]).norm() / moved
        # the same rows in another order: only the order of a float64 sum is left
        assert apart < 1e-12, (accumulate, ranks, apart.item())


class KeepMetrics(Callback):
    """Writes what was logged, and the moments of the scores, from the first rank."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            logged = {name: value.double().item() for name, value in trainer.callback_metrics.items()}
            moments = chain.from_iterable(getattr(pl_module, "moments", {"val": []})["val"])
            torch.save(logged | {f"moment {place}": value for place, value in enumerate(moments)}, self.path)


def measured(stage: str, folder: str, tmp_path: Path, ranks: int, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return what is logged of held-out rows on this many ranks."""
    make, load, data_module, options = STAGES[stage]
    data = data_module(load_tokenizer(folder), ROWS, rows, row_tokens=8, cache_dir=tmp_path)
    module = make(partial(load, folder, dtype="float64"), sgd(), **options)
    kept = tmp_path / "metrics.pt"
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp_fork" if ranks > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[KeepMetrics(kept)],
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.validate(module, data, verbose=False)
    return torch.load(kept, weights_only=True)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@quiet_lightning
def test_held_out_rows_count_once_on_any_number_of_ranks(tmp_path: Path, stage: str) -> None:
    """Two and seven batches, on two to four ranks: some ranks repeat a batch, one has nothing but a repeated one."""
    folder = start(tmp_path)
    for rows in (ROWS[:2], ROWS[:7]):
        expected = measured(stage, folder, tmp_path, 1, rows)
        assert "val/loss" in expected
        for ranks in (2, 3, 4) if stage == "reward" else (3,):
            assert measured(stage, folder, tmp_path, ranks, rows) == pytest.approx(expected, rel=1e-6, abs=1e-7), ranks
