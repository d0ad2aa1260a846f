"""SFT: its loss is plain cross-entropy on the counted tokens, normalised over the whole step, and it memorises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_lightning import SFT, DemonstrationData
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.ops.groups import Group, pack
from tests.helpers.lightning import quiet_lightning
from tests.modules.offline import Batches, adam, demonstrations, fit, lm, response_logprob, sgd, start


def test_loss_is_the_mean_over_loss_tokens() -> None:
    module = SFT(lm, sgd())
    module.configure_model()
    rows = [([1, 5, 6], [8, 9, 2], [True, True, True]), ([1, 7], [10, 11, 12, 2], [False, False, True, True])]
    expected = torch.cat([response_logprob(lm(), p, y)[torch.tensor(mask)] for p, y, mask in rows])
    loss = module.training_step(pack([Group(p, [y], [mask]) for p, y, mask in rows]), 0)
    assert loss.item() == pytest.approx(-expected.mean().item(), rel=1e-6)  # the log-softmax is float32


@quiet_lightning
def test_logged_losses_are_means_over_tokens_and_the_norm_is_that_of_the_step() -> None:
    """Batches of 5 and 2 tokens in the loss: a mean of the batches' means would be another number."""
    parts = [
        [Group([1, 5, 6], [[8, 9, 2]]), Group([1, 7], [[10, 11, 12, 2]], [[False, False, True, True]])],
        [Group([1, 30], [[31, 2]])],
    ]
    model = lm()
    loss = -torch.cat(
        [
            response_logprob(model, list(group.prompt), list(group.responses[0]))[-2 if group.loss_mask else None :]
            for part in parts
            for group in part
        ]
    ).mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    trainer = fit(SFT(lm, sgd(lr=0.0)), Batches(parts, parts), 1, accumulate=2)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    expected = {"train/loss": loss.item(), "val/loss": loss.item(), "optim/grad_norm": norm, "optim/lr": 0.0}
    assert logged == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@quiet_lightning
def test_sixteen_rows_are_memorised(tmp_path: Path, seed: int) -> None:
    folder = start(tmp_path)
    tokenizer = load_tokenizer(folder)
    rows = demonstrations(16)
    data = DemonstrationData(tokenizer, rows, rows, batch_size=16, seed=seed, cache_dir=tmp_path)
    module = SFT(lambda: load_causal_lm(folder), adam())
    trainer = fit(module, data, 60)
    assert trainer.callback_metrics["val/loss"] < 0.02
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "say teal"}], add_generation_prompt=True)
    ids = torch.tensor([ids["input_ids"]])
    answer = module.export_model().generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == rows[9]["response"]
    assert answer[-1] == tokenizer.eos_token_id  # and it has learned to stop
