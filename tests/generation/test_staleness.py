"""The fingerprint of weights and the probe: what changes them, and what does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from rlhf_lightning.generation.staleness import BLOCK, Probe, fingerprint
from rlhf_lightning.models.adapters import add_lora


def test_any_weight_changes_the_fingerprint(tiny_lm: Any) -> None:
    before = fingerprint(tiny_lm)
    assert fingerprint(copy.deepcopy(tiny_lm)) == before
    for parameter in tiny_lm.parameters():
        for place in (0, -1):
            with torch.no_grad():
                value = parameter.view(-1)[place].clone()
                parameter.view(-1)[place] = torch.nextafter(value, value + 1)
                assert fingerprint(tiny_lm) != before
                parameter.view(-1)[place] = value
    assert fingerprint(tiny_lm) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_that_change_places_change_the_fingerprint(tiny_lm: Any, dtype: torch.dtype) -> None:
    lm = tiny_lm.to(dtype)
    before, (weight, *_) = fingerprint(lm), lm.parameters()
    with torch.no_grad():
        weight[[5, 6]] = weight[[6, 5]]
    assert fingerprint(lm) != before


def test_blocks_and_signs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(16, 16, bias=False)
    whole = fingerprint(layer)
    monkeypatch.setattr("rlhf_lightning.generation.staleness.BLOCK", 100)
    assert fingerprint(layer) == whole
    assert BLOCK > 256
    with torch.no_grad():
        layer.weight[15, 15] *= -1
    assert fingerprint(layer) != whole


def test_an_adapter_is_a_part_of_it(tiny_lm: Any) -> None:
    adapted: Any = add_lora(tiny_lm, r=2)
    before = fingerprint(adapted)
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "lora_B" in n)[0, 0] = 1e-9
    assert fingerprint(adapted) != before


def test_a_probe_knows_its_own_numbers(tiny_lm: Any) -> None:
    tiny_lm.train()
    probe = Probe(tiny_lm, 0.1)
    tokens = list(range(probe.length))
    own = probe.own(tokens).tolist()
    assert tiny_lm.training
    assert len(probe.prompt) + probe.length <= 128
    assert max(probe.prompt) < 32  # the upper half of the ids may have no token
    assert probe.problem(tokens, own) is None
    assert probe.problem(tokens, own) is None  # again the same: the model has not moved
    assert probe.problem(tokens, [value - 0.09 for value in own]) is None
    assert "are off by 0.11 (mean of 16 tokens)" in str(probe.problem(tokens, [value - 0.11 for value in own]))
    assert "off by nan" in str(probe.problem(tokens, [float("nan"), *own[1:]]))


def test_numbers_that_stay_while_the_model_moves_are_old(tiny_lm: Any) -> None:
    probe = Probe(tiny_lm, 10.0)
    tokens = list(range(probe.length))
    own = probe.own(tokens).tolist()
    assert probe.problem(tokens, own) is None
    with torch.no_grad():
        tiny_lm.model.embed_tokens.weight.mul_(1.5)
    assert "stayed the same while the model's moved by" in str(probe.problem(tokens, own))
    assert probe.problem(tokens, [value + 1e-6 for value in own]) is None


def test_a_short_context_has_a_short_probe(tiny_lm: Any) -> None:
    tiny_lm.config.max_position_embeddings = 16
    probe = Probe(tiny_lm, 0.1)
    assert (len(probe.prompt), probe.length) == (8, 4)
