"""Compiled decoder layers: the same numbers, weights under the same names, and no compiling of every new length."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from rlhf_lightning.models import layers
from rlhf_lightning.models.adapters import adapter_off, add_lora
from rlhf_lightning.models.attention import GROUP_SDPA
from rlhf_lightning.models.completion import CompletionModel, choose_layout, hidden_states, unwrap
from rlhf_lightning.models.layers import BUCKET, compile_layers, is_compiled, not_compiled
from rlhf_lightning.models.sharding import call
from rlhf_lightning.ops.groups import Group, Layout, pack
from tests.helpers.models import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler makes warnings of its own


def decoder() -> Any:
    torch.manual_seed(1)
    model = LlamaForCausalLM(tiny_config(num_hidden_layers=2))
    model.set_attn_implementation(GROUP_SDPA)
    return model.train()


def groups(seed: int, response: int = 40) -> list[Group]:
    """Return one to four pairs of other lengths for every seed."""
    return [
        Group(
            [1, *[5 + (7 * g + seed) % 50] * (3 + (5 * g + 11 * seed) % 90)],
            [[6 + (g + j + seed) % 40] * (response + (37 * seed + 13 * j + g) % 70) for j in range(2)],
        )
        for g in range(1 + seed % 4)
    ]


def read(model: Any, seed: int, layout: Layout = "packed", response: int = 40) -> tuple[Tensor, list[Tensor]]:
    """Return log-probabilities and the gradients of their sum."""
    model.zero_grad()
    logprobs = CompletionModel(model)(pack(groups(seed, response), 512, layout=layout)).logprobs
    logprobs.sum().backward()
    return logprobs.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    for gradient, plain in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("layout", "response"), [("packed", 64), ("packed", 8), ("padded", 8)])
def test_filling_up_a_row_changes_nothing(layout: Layout, response: int) -> None:
    """By runs, with the dense mask of short responses, and padded; the layers see multiples of 128."""
    model, lengths = decoder(), set[int]()
    expected = read(model, 2, layout, response)
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: lengths.add(inputs[0].shape[1]))
    read(model, 2, layout, response)
    layers._COMPILED.add(model)
    assert all(length % BUCKET for length in lengths)
    lengths.clear()
    assert_same(read(model, 2, layout, response), expected)
    assert lengths
    assert not any(length % BUCKET for length in lengths)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A decoder compiled without code generation, which takes minutes: what is compiled how often is the same."""
    torch._dynamo.reset()
    monkeypatch.setattr(layers, "BACKEND", "eager")
    model = decoder()
    compile_layers(model)
    yield model
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_new_lengths_are_not_compiled_again(compiled: Any) -> None:
    plain, begun = decoder(), graphs()
    assert choose_layout(compiled) == ("packed", None)
    assert graphs() == begun  # neither is what only looks at the model
    for layout in ("packed", "padded"):
        seen = []
        for seed in range(1, 9):
            assert_same(read(compiled, seed, layout), read(plain, seed, layout))
            seen.append(graphs())
        assert seen[2] == seen[-1]
    assert 0 < graphs() - begun <= 12


@pytest.mark.slow
def test_the_iterations_of_ppo_are_compiled_once(compiled: Any) -> None:
    """Evaluation and training mode take turns, and between them the policy decodes."""
    seen = []
    for iteration in range(4):
        compiled.eval()
        with torch.no_grad():
            before = graphs()
            call(compiled, input_ids=torch.tensor([[1, 5, 6 + iteration]]), use_cache=True)
            assert graphs() == before
            CompletionModel(compiled)(pack(groups(2)))
        compiled.train()
        read(compiled, 2 + iteration % 2)
        seen.append(graphs())
    assert seen[1] == seen[3]


@pytest.mark.slow
@pytest.mark.nightly
def test_an_adapter_that_is_switched_off_and_on_is_compiled_once(compiled: Any) -> None:
    model, plain = add_lora(compiled, r=2), add_lora(decoder(), r=2)
    assert is_compiled(unwrap(model))
    seen = []
    for _ in range(3):
        assert_same(read(model, 2), read(plain, 2))
        with torch.no_grad(), adapter_off(model):
            model.eval()
            found = hidden_states(model, pack(groups(2)))
            model.train()
        seen.append(graphs())
    with torch.no_grad(), adapter_off(plain):
        torch.testing.assert_close(found, hidden_states(plain, pack(groups(2))))
    assert seen[0] == seen[2]


@pytest.mark.slow
def test_compiled_layers_with_activation_checkpointing(compiled: Any) -> None:
    expected = read(decoder(), 2)
    compiled.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(read(compiled, 2), expected)


def test_weights_keep_their_names_and_a_copy_is_not_compiled(compiled: Any) -> None:
    assert list(compiled.state_dict()) == list(decoder().state_dict())
    copied = copy.deepcopy(compiled)
    assert is_compiled(compiled)
    assert not is_compiled(copied)
    assert not any(layer._compiled_call_impl for layer in copied.model.layers)
    with not_compiled(copied):
        pass
