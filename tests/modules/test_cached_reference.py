"""Cached reference log-probabilities are those of the reference's own weights, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from rlhf_lightning import PreferenceData
from rlhf_lightning.models.completion import CompletionModel
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.modules.cached_reference import attach_references
from tests.modules.offline import preferences, response_logprob, start


def test_the_cache_belongs_to_the_weights_and_every_row_to_its_pair(tmp_path: Path) -> None:
    folder = start(tmp_path)
    data = PreferenceData(load_tokenizer(folder), preferences(6), row_tokens=24, cache_dir=tmp_path)
    data.setup()
    other = load_causal_lm(folder)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    for model in (load_causal_lm(folder), other):
        assert isinstance(model, LlamaForCausalLM)
        attach_references(Frozen(CompletionModel(model)), data)
        for row in range(6):
            group = data.group("train", row)
            assert group.ref_logprobs is not None
            for response, found in zip(group.responses, group.ref_logprobs, strict=True):
                with torch.no_grad():
                    expected = response_logprob(model, list(group.prompt), list(response)).sum().item()
                assert found == pytest.approx(expected, abs=1e-3)
