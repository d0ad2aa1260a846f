"""What every run checks before its first update, and that a run that breaks it stops with a reason and changes nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_lightning import DPO, SFT, DemonstrationData, PreferenceData
from rlhf_lightning.data.template import Conversation, Template
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.completion import CompletionModel
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.modules.invariants import apart, is_exact
from tests.helpers.lightning import quiet_lightning
from tests.modules import bandit
from tests.modules.offline import adam, demonstrations, fit, lm, preferences, sgd, start


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return start(tmp_path_factory.mktemp("invariants"))


def dpo(folder: str, tmp_path: Path, dropout: float = 0.0, **options: Any) -> tuple[DPO, PreferenceData]:
    data = PreferenceData(load_tokenizer(folder), preferences(), batch_size=8, cache_dir=tmp_path)
    return DPO(partial(load_causal_lm, folder, dropout=dropout), adam(), **options), data


def test_rounding_is_told_from_a_difference() -> None:
    """float32 is judged token by token, lower precisions by the mean."""
    expected = torch.full((100,), -2.0)
    one = expected.clone()
    one[3] += 0.1
    assert apart(expected + 5e-4, expected, exact=True)[1] is False
    assert apart(one, expected, exact=True) == (pytest.approx(0.1), True)
    assert apart(one, expected, exact=False) == (pytest.approx(1e-3), False)
    assert apart(expected - 0.1, expected, exact=False) == (pytest.approx(0.1), True)
    assert is_exact(lm())
    assert not is_exact(lm(), "bf16-mixed")
    assert not is_exact(lm().bfloat16())


# ---- rows ----------------------------------------------------------------------------------------------------------


@quiet_lightning
def test_a_row_without_a_counted_token_stops_the_run(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Template.conversation

    def masked(self: Template, content: Any, *more: Any) -> Conversation:
        whole = honest(self, content, *more)
        learned = "blue" not in content[0]["content"]
        return whole._replace(loss_mask=[learned and counted for counted in whole.loss_mask])

    monkeypatch.setattr(Template, "conversation", masked)
    data = DemonstrationData(load_tokenizer(folder), demonstrations(), batch_size=8, cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"row 3: no token of the response is learned"):
        fit(SFT(partial(load_causal_lm, folder), sgd()), data, 1)


@pytest.mark.slow
@quiet_lightning
def test_answers_that_are_all_cut_stop_the_run(tmp_path: Path, folder: str) -> None:
    tokenizer = load_tokenizer(folder)
    prompt = max(
        len(Template(tokenizer).prompt([{"role": "user", "content": row["prompt"]}])) for row in demonstrations()
    )
    data = DemonstrationData(tokenizer, demonstrations(), batch_size=8, max_length=prompt + 1, cache_dir=tmp_path)
    with pytest.raises(UserError, match="none of 16 responses ends with EOS, all are cut at data.max_length"):
        fit(SFT(partial(load_causal_lm, folder), sgd()), data, 1)


@pytest.mark.slow
@quiet_lightning
def test_raw_text_may_be_cut(tmp_path: Path, folder: str) -> None:
    rows = [{"text": "red green blue white " * 4}] * 4
    data = DemonstrationData(load_tokenizer(folder), rows, batch_size=4, max_length=6, cache_dir=tmp_path)
    assert fit(SFT(partial(load_causal_lm, folder), sgd()), data, 1).global_step == 1


@quiet_lightning
def test_ids_the_model_does_not_know_stop_the_run(tmp_path: Path, folder: str) -> None:
    data = DemonstrationData(load_tokenizer(folder), demonstrations(), batch_size=8, cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"row 1 contains the token id \d+, but the model's vocabulary has 64 ids"):
        fit(SFT(lm, sgd()), data, 1)


# ---- the policy is its reference -----------------------------------------------------------------------------------


@pytest.mark.slow
@quiet_lightning
def test_dpo_refuses_dropout(tmp_path: Path, folder: str) -> None:
    module, data = dpo(folder, tmp_path, dropout=0.3)
    with pytest.raises(UserError, match=r"log pi and log pi_ref differ by .* per token .*switch off dropout"):
        fit(module, data, 1)


@pytest.mark.slow
@quiet_lightning
def test_dpo_refuses_cached_values_of_another_model(tmp_path: Path, folder: str) -> None:
    module, data = dpo(folder, tmp_path, reference="cached")
    fit(module, data, 2)
    (file,) = (tmp_path / "reference").glob("*.npy")
    np.save(file, np.load(file) - 1.0)
    module, data = dpo(folder, tmp_path, reference="cached")
    with pytest.raises(UserError, match="the reference is not the model that training starts from"):
        fit(module, data, 1)


@pytest.mark.slow
@quiet_lightning
def test_simpo_has_no_reference_to_compare_with(tmp_path: Path, folder: str) -> None:
    module, data = dpo(folder, tmp_path, loss="simpo")
    assert fit(module, data, 1).global_step == 1


@quiet_lightning
def test_ppo_refuses_a_reference_that_is_another_model() -> None:
    module = bandit.build()
    module.configure_model()
    other = bandit.load()
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    assert module.reference is not None
    module.reference.model = CompletionModel(other).eval()
    before = bandit.weights(module)
    with pytest.raises(UserError, match="log pi and log pi_ref differ by .* before the first update"):
        bandit.fit(module, bandit.Prompts(1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in bandit.weights(module).items())


@pytest.mark.slow
@quiet_lightning
def test_a_policy_that_has_moved_is_not_stopped() -> None:
    rows = bandit.fit(bandit.build(), bandit.Prompts(3)).rows
    assert rows[2]["kl/reference"] > 1e-2
