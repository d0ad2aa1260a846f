"""What every stage shares: step counts, parameter groups, weighted means, and stopping at what is not finite."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_lightning import DPO, SFT, DemonstrationData, PreferenceData, RewardModel
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer
from rlhf_lightning.modules.base import decay_groups
from rlhf_lightning.ops.groups import Group
from tests.helpers.lightning import quiet_lightning
from tests.modules.offline import Batches, demonstrations, fit, lm, sgd, start


def test_norms_and_biases_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    model[2].weight.requires_grad_(False)
    matrices, others = decay_groups(model, lr=0.5)
    assert [p.shape for p in matrices["params"]] == [(4, 3)]
    assert sorted(p.shape for p in others["params"]) == [(4,), (4,), (4,)]
    assert (matrices["lr"], others["lr"], others["weight_decay"]) == (0.5, 0.5, 0.0)
    assert "weight_decay" not in matrices


def test_a_mean_is_weighted_by_items_not_by_microbatches() -> None:
    module = SFT(lm, sgd())
    module.track("train", 1, loss=torch.tensor(10.0))
    module.track("train", 3, loss=torch.tensor(2.0))
    total, count = module._sums["train"]["loss"]
    assert (total / count).item() == 3.0


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "steps", "accumulate", "expected"), [(3, -1, 1, 12), (3, -1, 2, 12), (3, 7, 2, 7)])
@quiet_lightning
def test_the_schedule_sees_optimizer_updates(
    tmp_path: Path, epochs: int, steps: int, accumulate: int, expected: int
) -> None:
    folder, seen = start(tmp_path), []

    def schedule(optimizer: Any, total: int) -> Any:
        seen.append(total)
        return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)

    data = DemonstrationData(load_tokenizer(folder), demonstrations(16), batch_size=4, cache_dir=tmp_path)
    module = SFT(partial(load_causal_lm, folder), sgd(), schedule)
    from lightning.pytorch import Trainer

    trainer = Trainer(
        max_epochs=epochs, max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data)
    assert seen == [expected]
    assert trainer.global_step == expected


@quiet_lightning
def test_a_loss_that_is_not_finite_names_step_and_rows() -> None:
    module = SFT(lm, sgd())
    module.configure_model()
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))
    batch = [Group([1, 5], [[6, 2]], index=17), Group([1, 5], [[7, 2]], index=4)]
    with pytest.raises(UserError, match=r"the loss is nan at step 0, in rows \[17, 4\]; lower optimizer\.lr"):
        fit(module, Batches([batch]), 1, limit_val_batches=0)


@quiet_lightning
def test_a_bad_row_is_named_as_it_stands_in_the_file(tmp_path: Path) -> None:
    """A skipped row before it does not shift its number."""
    folder, path = start(tmp_path), tmp_path / "demos.jsonl"
    rows = [{"prompt": "say red", "response": ""}, *demonstrations(1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DemonstrationData(load_tokenizer(folder), str(path), on_bad_row="skip", cache_dir=tmp_path)
    module = SFT(partial(load_causal_lm, folder), sgd())
    module.configure_model()
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"the loss is nan at step 0, in .*demos\.jsonl, row 2; lower"):
        fit(module, data, 1)


@pytest.mark.slow
@quiet_lightning
def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    folder = start(tmp_path)
    module = SFT(partial(load_causal_lm, folder), sgd())
    data = DemonstrationData(load_tokenizer(folder), demonstrations(8), batch_size=8, cache_dir=tmp_path)

    def poisoned(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")

    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    next(module.parameters()).register_hook(poisoned)
    with pytest.raises(UserError, match="the gradient is not finite at step 0; lower optimizer.lr"):
        fit(module, data, 2)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("clipping", ["norm", "value"])
@quiet_lightning
def test_gradients_are_clipped_before_a_fused_step(tmp_path: Path, precision: str, clipping: Any) -> None:
    """With a rate of 1, the update is the clipped gradient; the norm that is logged is the one before."""
    from lightning.pytorch import Trainer

    folder = start(tmp_path)
    data = DemonstrationData(load_tokenizer(folder), demonstrations(8), batch_size=8, cache_dir=tmp_path)
    module = SFT(partial(load_causal_lm, folder), partial(torch.optim.SGD, lr=1.0, fused=True))
    trainer: Any = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, precision=precision, gradient_clip_val=1e-2, gradient_clip_algorithm=clipping,
        use_distributed_sampler=False,
    )  # fmt: skip
    module.configure_model()
    before = torch.cat([p.detach().flatten().double() for p in module.parameters()])
    trainer.fit(module, data)
    change = torch.cat([p.detach().flatten().double() for p in module.parameters()]) - before
    size = change.norm() if clipping == "norm" else change.abs().max()
    assert size.item() == pytest.approx(1e-2, rel=1e-3)
    assert trainer.callback_metrics["optim/grad_norm"] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [SFT, DPO, RewardModel])
@quiet_lightning
def test_parts_of_a_step_of_unequal_size_do_not_change_it(tmp_path: Path, stage: Any) -> None:
    """Five rows make parts of unequal numbers of rows and tokens: a mean of the parts' means would be another step."""
    folder = start(tmp_path)
    load = partial(load_scalar_model if stage is RewardModel else load_causal_lm, folder)
    read = DemonstrationData if stage is SFT else PreferenceData
    rows = [{"prompt": "say red", "chosen": "gold " * n, "rejected": "ruby"} for n in (1, 9, 2, 7, 3)]
    before = torch.cat([p.detach().flatten() for p in load().parameters()])
    found = []
    for accumulate in (1, 2, 4):
        data = read(load_tokenizer(folder), rows, batch_size=5, cache_dir=tmp_path)
        module = stage(load, sgd(1.0))
        fit(module, data, 1, accumulate)
        found.append(torch.cat([p.detach().flatten() for p in module.parameters()]) - before)
    for other in found[1:]:
        assert (other - found[0]).norm() / found[0].norm() < 1e-4  # float32, another order of summation
