"""Cached reference log-probabilities are those of the reference's own weights, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from transformers import LlamaForCausalLM

from rlhf_lightning import PreferenceData
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.completion import CompletionModel
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.modules.cached_reference import CachedReference
from rlhf_lightning.ops.groups import pack
from tests.modules.offline import preferences, response_logprob, start


@pytest.mark.slow
def test_the_cache_belongs_to_the_weights_and_every_row_to_its_pair(tmp_path: Path) -> None:
    folder = start(tmp_path)
    data = PreferenceData(load_tokenizer(folder), preferences(6), row_tokens=24, cache_dir=tmp_path)
    data.setup()
    other = load_causal_lm(folder)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    for model in (load_causal_lm(folder), other):
        assert isinstance(model, LlamaForCausalLM)
        cached = CachedReference(Frozen(CompletionModel(model)), data, "packed")
        groups = [data.group("train", row) for row in (4, 1, 2)]  # a batch in another order
        logprobs = iter(cached(pack(groups), "train").tolist())
        for group in groups:
            for response in group.responses:
                with torch.no_grad():
                    expected = response_logprob(model, list(group.prompt), list(response)).sum().item()
                assert next(logprobs) == pytest.approx(expected, abs=1e-3)


def test_a_loader_without_rows_cannot_be_cached(tmp_path: Path) -> None:
    reference = Frozen(CompletionModel(load_causal_lm(start(tmp_path))))
    with pytest.raises(UserError, match=r"dpo\.reference=cached reads the rows of a PreferenceData"):
        CachedReference(reference, LightningDataModule(), "packed")
