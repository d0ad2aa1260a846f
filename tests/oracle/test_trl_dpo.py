"""DPO and its relatives: loss, gradient norm and ten optimizer steps equal TRL's DPOTrainer and CPOTrainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from rlhf_lightning import DPO, PreferenceData
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.ops.groups import Group, pack
from tests.oracle.side_by_side import (
    BATCH,
    Curve,
    arguments,
    assert_same,
    in_our_order,
    optimizer,
    our_tokens,
    preferences,
    quiet_trl,
    start,
    tokenizer,
    train_ours,
    train_theirs,
)

trl = pytest.importorskip("trl", reason="TRL is absent: pip install 'rlhf-lightning[oracle]'")
pytestmark = pytest.mark.oracle


ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH}


def pairs(folder: Path) -> tuple[PreferenceData, Any]:
    rows = preferences()
    data = PreferenceData(tokenizer(folder), rows, batch_size=BATCH, cache_dir=folder, row_tokens=64)
    return data, in_our_order(data, rows)


def their_trainer(folder: Path, dataset: Any, **options: Any) -> Any:
    extra = {name: options.pop(name) for name in ("peft_config",) if name in options}
    reference = {} if extra else {"ref_model": load_causal_lm(start(folder))}
    settings = arguments(trl.DPOConfig, folder, **options)
    model = load_causal_lm(start(folder))
    return trl.DPOTrainer(
        model, args=settings, train_dataset=dataset, processing_class=tokenizer(folder), **reference, **extra
    )


def both(folder: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[Curve, Curve]:
    """Return our curve and TRL's; the first step is at the reference, the others move away from it."""
    data, dataset = pairs(folder)
    trainer = their_trainer(folder, dataset, **theirs)
    for group, row in zip(our_tokens(data), trainer.train_dataset, strict=True):
        assert group.prompt == row["prompt_ids"]
        assert list(group.responses) == [row["chosen_ids"], row["rejected_ids"]]
    module = DPO(partial(load_causal_lm, start(folder)), optimizer(), **ours)
    if "peft_config" in theirs:
        module.configure_model()
        module.policy.lm.load_state_dict(trainer.model.state_dict())  # the same random adapter
    return train_ours(module, data), train_theirs(trainer)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"beta": 0.3}, {"beta": 0.3}),
        ({"loss": "robust", "label_smoothing": 0.2}, {"loss_type": "robust", "label_smoothing": 0.2}),
        ({"loss": "ipo", "beta": 0.5}, {"loss_type": "ipo", "beta": 0.5}),
        ({"length_normalized": True, "beta": 2.0}, {"loss_type": "sigmoid_norm", "beta": 2.0}),
        ({"reference": "cached"}, {"precompute_ref_log_probs": True}),
    ],
    ids=["sigmoid", "robust", "ipo", "length", "cached"],
)
@quiet_trl
def test_losses(tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert_same(*both(tmp_path, ours, theirs))


@quiet_trl
def test_adapter_as_reference(tmp_path: Path) -> None:
    """With LoRA both take the model without the adapter as the reference."""
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    assert_same(*both(tmp_path, {"lora": {"r": 4, "alpha": 8}}, {"peft_config": lora}))


@quiet_trl
def test_conservative_dpo(tmp_path: Path) -> None:
    """TRL's sigmoid has no label smoothing any more; its "aot", pair by pair, is conservative DPO."""
    theirs = {"loss_type": "aot", "label_smoothing": 0.2, **ONE_BY_ONE}
    assert_same(*both(tmp_path, {"label_smoothing": 0.2}, theirs))


SFT_TERM = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}


@quiet_trl
def test_sft_term(tmp_path: Path) -> None:
    """Pair by pair, because TRL averages the term over the tokens of a batch and we over responses, as RPO does."""
    assert_same(*both(tmp_path, {"sft_coef": 0.7}, SFT_TERM | ONE_BY_ONE))


@quiet_trl
def test_sft_term_of_a_whole_batch(tmp_path: Path) -> None:
    """TRL's term is a mean over the chosen tokens of the batch, ours a mean over pairs of each response's mean."""
    data, dataset = pairs(tmp_path)
    trainer = their_trainer(tmp_path, dataset, **SFT_TERM)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(BATCH)])
    theirs = trainer.compute_loss(trainer.model, inputs).item()

    groups = our_tokens(data)[:BATCH]
    module = DPO(partial(load_causal_lm, start(tmp_path)), optimizer(), sft_coef=0.7)
    module.configure_model()
    ours = module.losses(pack(groups), "val").mean().item()

    chosen = module.policy(pack([Group(group.prompt, group.responses[:1]) for group in groups])).logprobs
    lengths = [len(group.responses[0]) for group in groups]
    assert len(set(lengths)) > 1
    per_response = sum(part.mean().item() for part in chosen.split(lengths)) / BATCH
    assert abs(theirs - ours) > 1e-3
    assert theirs - ours == pytest.approx(0.7 * (per_response - chosen.mean().item()), rel=1e-3)


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@quiet_trl
def test_simpo(tmp_path: Path) -> None:
    cpo = pytest.importorskip("trl.experimental.cpo", reason="this TRL has no SimPO")
    data, dataset = pairs(tmp_path)
    options = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0}
    trainer = cpo.CPOTrainer(
        load_causal_lm(start(tmp_path)),
        args=arguments(cpo.CPOConfig, tmp_path, **options),
        train_dataset=dataset,
        processing_class=tokenizer(tmp_path),
    )
    for group, row in zip(our_tokens(data), trainer.train_dataset, strict=True):
        responses = [[token for token in row[f"{name}_labels"] if token != -100] for name in ("chosen", "rejected")]
        assert [group.prompt, *group.responses] == [row["prompt_input_ids"], *responses]
    ours = DPO(partial(load_causal_lm, start(tmp_path)), optimizer(), loss="simpo", beta=2.0, target_margin=0.5)
    assert_same(train_ours(ours, data), train_theirs(trainer))
