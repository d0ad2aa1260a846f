"""A step is the same step however it is split: 1 x 8 rows, 8 x 1, or two ranks with 4 each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning import DPO, SFT, DemonstrationData, PreferenceData, RewardModel
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer
from tests.helpers.lightning import quiet_lightning
from tests.modules.bandit import KeepWeights
from tests.modules.offline import fit, sgd, start

# unequal lengths: a mean of the microbatches' means would differ in the second digit
ROWS = [
    {"prompt": "say red", "chosen": "gold " * n, "rejected": "ruby", "margin": 0.1 * n, "label": 1 - 0.05 * n}
    for n in (1, 9, 2, 7, 3, 6, 8, 4)
]  # fmt: skip
STAGES: dict[str, tuple[Callable[..., Any], Callable[..., Any], type[Any], dict[str, Any]]] = {
    "sft": (SFT, load_causal_lm, DemonstrationData, {}),
    "reward": (RewardModel, load_scalar_model, PreferenceData, {}),
    "dpo": (DPO, load_causal_lm, PreferenceData, {"beta": 0.5, "sft_coef": 0.1}),
}


def learned(stage: str, folder: str, tmp_path: Path, accumulate: int = 1, ranks: int = 1) -> dict[str, Tensor]:
    """Return how far one step of plain gradient descent moved each weight, in float64."""
    make, load, data_module, options = STAGES[stage]
    data = data_module(load_tokenizer(folder), ROWS, batch_size=8, accumulate=accumulate, cache_dir=tmp_path)
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
