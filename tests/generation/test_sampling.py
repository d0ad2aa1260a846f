"""Sampling: greedy equals Hugging Face, draws follow the model and do not depend on batching."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Lfm2Config,
    LlamaForCausalLM,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    Qwen3_5TextConfig,
)

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Generations
from rlhf_lightning.generation.local import _CACHED, _STATIC, LocalEngine, invert
from rlhf_lightning.models.adapters import add_lora, merge_lora
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from tests.helpers.models import tiny_config

EOS = {2}
PROMPTS = [[1, 5, 6, 7, 8, 9, 10], [1], [1, 20, 21], [1, 30], [1, 40, 41, 42, 43]]


def loud(**changes: object) -> LlamaForCausalLM:
    """Return a random Llama whose next-token distributions are far from uniform."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(tiny_config(initializer_range=0.3, **changes)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight[2] *= 1.5  # EOS comes up now and then
    return model


def sampler(
    lm: Any, eos: Iterable[int], max_new_tokens: int, temperature: float = 1.0, **options: Any
) -> Callable[..., Generations]:
    """Return what generates from `lm`, called with prompts."""
    engine = LocalEngine(**options)
    engine.start(lm, eos)
    return partial(engine.generate, max_new_tokens=max_new_tokens, temperature=temperature)


def next_logits(model: LlamaForCausalLM, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


def reference_greedy(model: LlamaForCausalLM, prompt: list[int], eos: set[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, eos_token_id=sorted(eos),
        pad_token_id=0,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


def test_greedy_equals_generate() -> None:
    model = loud()
    found = sampler(model, EOS, 24, temperature=0)(PROMPTS)
    assert found.responses == [reference_greedy(model, p, EOS, 24) for p in PROMPTS]
    assert found.finished == [r[-1] == 2 for r in found.responses]


@pytest.mark.slow
def test_greedy_equals_generate_on_a_real_model(stories_model: Path) -> None:
    model, tokenizer = load_causal_lm(str(stories_model)), load_tokenizer(str(stories_model))
    texts = ("Once upon a time", "Lily had a red ball. One day,", "The dog")
    prompts = [tokenizer(text).input_ids for text in texts]
    eos = {tokenizer.eos_token_id}
    found = sampler(model, eos, 40, temperature=0)(prompts)
    assert found.responses == [reference_greedy(model.eval(), p, eos, 40) for p in prompts]  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("n", [1, 3])
def test_static_shapes_give_the_tokens_of_the_plain_loop(temperature: float, n: int) -> None:
    """With responses that end at different steps, some at the context's end, and a batch that is halved."""
    model = loud(max_position_embeddings=32)
    plain, static = (
        sampler(model, set(range(2, 64, 8)), 40, temperature, static=s)(PROMPTS, num_generations=n, seed_parts=(5,))
        for s in (False, True)
    )
    assert _STATIC[model]
    lengths = sorted(len(response) for response in plain.responses)
    assert lengths[0] < lengths[-1] < 40
    assert plain == static


def test_static_shapes_are_refused_where_the_cache_holds_other_layers(caplog: pytest.LogCaptureFixture) -> None:
    """A sliding window's cache is no buffer of all tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**SIZES, sliding_window=4)).eval()
    plain, static, again = (sampler(model, EOS, 8, static=s)(PROMPTS) for s in (False, True, True))
    assert plain == static == again
    assert caplog.text.count("MistralForCausalLM is sampled without static shapes") == 1  # and is not tried again


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GATED = {
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
HYBRIDS = {
    "convolution": (Lfm2Config, {"layer_types": ["conv", "full_attention"]}, True),
    "gated delta rule": (Qwen3_5TextConfig, GATED, True),
    # one layer has states and attention: it inherits a batch_select_indices that leaves the states as they are
    "both in a layer": (
        FalconH1Config,
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
        True,
    ),
    "state space": (MambaConfig, {"state_size": 8}, False),
    "a cache of its own": (
        MiniMaxConfig,
        {"head_dim": 8, "num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]},
        False,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HYBRIDS)
def test_models_whose_caches_hold_states_are_sampled_right(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Every token is the one a forward pass over the whole text gives, whatever ends before it in the batch.

    Where the cache cannot be used, every step reads the whole text, and one line says so.
    """
    config, more, cached = HYBRIDS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**(SIZES | more))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)  # far from uniform: a wrong state shows
    eos = set(range(2, 64, 4))
    found = sampler(model, eos, 8, top_k=1)(PROMPTS, num_generations=2)
    assert len({len(response) for response in found.responses}) > 1  # some left the batch before others
    for i, response in enumerate(found.responses):
        ids = list(PROMPTS[i // 2])
        for token in response:
            with torch.no_grad():
                assert token == model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
            ids.append(token)
    assert ("is sampled without a cache, which is slow" in caplog.text) is not cached
    assert sampler(model, eos, 8)(PROMPTS, 3) == sampler(model, eos, 8, batch_tokens=1)(PROMPTS, 3)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}])
def test_a_plain_decoder_is_sampled_with_its_cache(changes: dict[str, int], caplog: pytest.LogCaptureFixture) -> None:
    """A mistake in prefill or step would else be hidden by passes over the whole text."""
    model = loud(**changes)
    sampler(model, EOS, 4)(PROMPTS)
    assert _CACHED[model]
    assert "without a cache" not in caplog.text


def test_a_model_that_reads_padding_is_refused() -> None:
    """Its responses would vary with what else is in the batch."""
    model = loud()
    forward = model.forward
    model.forward = lambda input_ids, **kwargs: forward(input_ids.flip(0), **kwargs)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="LlamaForCausalLM cannot be sampled from"):
        sampler(model, EOS, 4)(PROMPTS)


def test_samples_do_not_depend_on_batching() -> None:
    model = loud()
    whole = sampler(model, EOS, 12)(PROMPTS, num_generations=3, seed_parts=(4, "train", 9))
    assert sampler(model, EOS, 12, batch_tokens=1)(PROMPTS, num_generations=3, seed_parts=(4, "train", 9)) == whole
    order = [3, 0, 4]
    part = sampler(model, EOS, 12)(
        [PROMPTS[i] for i in order], num_generations=3, seed_parts=(4, "train", 9), ids=order
    )
    assert part.responses == [whole.responses[3 * i + k] for i in order for k in range(3)]
    first = sampler(model, EOS, 12)(PROMPTS, num_generations=1, seed_parts=(4, "train", 9))
    assert first.responses == whole.responses[::3]
    other = sampler(model, EOS, 12)(PROMPTS, num_generations=3, seed_parts=(5, "train", 9))
    assert other.responses != whole.responses


def test_the_samples_of_a_prompt_differ() -> None:
    found = sampler(loud(), EOS, 8)([PROMPTS[0]], num_generations=8)
    assert len({tuple(r) for r in found.responses}) > 4


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_frequencies_follow_the_distribution(temperature: float) -> None:
    model, n = loud(), 4000
    found = sampler(model, EOS, 1, temperature)([PROMPTS[0]], num_generations=n)
    counts = torch.bincount(torch.tensor([r[0] for r in found.responses]), minlength=64).double()
    expected = (next_logits(model, PROMPTS[0]).double() / temperature).softmax(-1) * n
    often = expected >= 5
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
    degrees = int(often.sum()) - 1
    assert degrees >= 5
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations of chi-squared
    assert counts[~often].sum() < expected[~often].sum() + 4 * expected[~often].sum().sqrt() + 1


@pytest.mark.parametrize(("size", "block"), [(1, 4), (4, 4), (13, 4), (700, 256)])
def test_inverting_by_blocks_equals_one_cumulative_sum(size: int, block: int) -> None:
    """Shares of 0, also of whole blocks and at both ends, are never drawn; uniforms close to 0 and 1 are no exception."""
    rng = torch.Generator().manual_seed(size)
    # multiples of 1/64 add up without rounding, so both ways agree exactly
    weights = torch.randint(0, 3, (300, size), generator=rng) / 64
    weights[:, : size // 2] *= (torch.rand(300, 1, generator=rng) < 0.5) & (size > 1)
    weights[torch.arange(300), torch.randint(0, size, (300,), generator=rng)] += 1 / 64
    uniforms = torch.rand(300, generator=rng)
    uniforms[:20], uniforms[20:40] = 0.0, 1 - 2**-24
    found = invert(weights, uniforms, block)
    for row, place in enumerate(found.tolist()):
        sums = [0.0, *torch.cumsum(weights[row].double(), 0).tolist()]
        assert sums[place] <= uniforms[row].item() * sums[-1] < sums[place + 1]


def test_later_tokens_condition_on_earlier_ones() -> None:
    """The likeliest continuation after each sampled token is the one a fresh forward pass gives."""
    model = loud()
    found = sampler(model, set(), 6, top_k=1)(PROMPTS, num_generations=2)
    for i, response in enumerate(found.responses):
        ids = list(PROMPTS[i // 2])
        for token in response:
            assert token == next_logits(model, ids).argmax().item()
            ids.append(token)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}])
def test_narrowest_choices_are_greedy(options: dict[str, float]) -> None:
    model = loud()
    greedy = sampler(model, EOS, 10, temperature=0)(PROMPTS)
    assert sampler(model, EOS, 10, **options)(PROMPTS) == greedy  # type: ignore[arg-type]


def test_top_k_and_top_p_stay_inside_their_sets() -> None:
    model = loud()
    probabilities, order = next_logits(model, PROMPTS[0]).softmax(-1).sort(descending=True)
    drawn = {r[0] for r in sampler(model, EOS, 1, top_k=3)([PROMPTS[0]], num_generations=300).responses}
    assert drawn == set(order[:3].tolist())
    inside = int((probabilities.cumsum(-1) < 0.8).sum()) + 1  # up to and including the token that crosses 0.8
    drawn = {r[0] for r in sampler(model, EOS, 1, top_p=0.8)([PROMPTS[0]], num_generations=1500).responses}
    assert drawn == set(order[:inside].tolist())


def test_end_is_part_of_the_response_and_stored() -> None:
    found = sampler(loud(), EOS, 16)(PROMPTS, num_generations=6)
    assert {True, False} == set(found.finished)
    for response, finished in zip(found.responses, found.finished, strict=True):
        assert (response[-1] == 2) == finished
        assert 2 not in response[:-1]
        assert finished or len(response) == 16


def test_all_may_end_at_the_first_token() -> None:
    found = sampler(loud(), range(64), 16)(PROMPTS)
    assert found.finished == [True] * 5
    assert [len(r) for r in found.responses] == [1] * 5


def test_responses_stop_at_the_context() -> None:
    model = loud(max_position_embeddings=12)
    found = sampler(model, set(), 8)([[1] * 5, [1] * 10, [1] * 11, [1] * 12])
    assert [len(r) for r in found.responses] == [7, 2, 1, 1]
    assert not any(found.finished)


def test_no_prompts() -> None:
    assert sampler(loud(), EOS, 4)([]) == Generations([], [])


@pytest.mark.parametrize("training", [True, False])
def test_runs_without_dropout_and_restores_the_mode(training: bool) -> None:
    model = loud(attention_dropout=0.9)
    model.train(training)
    found = sampler(model, EOS, 10, temperature=0)(PROMPTS)
    assert model.training is training
    assert found == sampler(model.eval(), EOS, 10, temperature=0)(PROMPTS)
    assert all(p.grad is None for p in model.parameters())


def test_mode_is_restored_after_an_error() -> None:
    model = loud().train()
    with pytest.raises(IndexError):
        sampler(model, EOS, 4)([[1, 10_000]])
    assert model.training


def test_works_through_an_adapter() -> None:
    model = add_lora(loud(), r=4, alpha=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    merged = merge_lora(model)
    found = sampler(model, EOS, 10, temperature=0)(PROMPTS)
    assert found == sampler(merged, EOS, 10, temperature=0)(PROMPTS)
    assert found != sampler(loud(), EOS, 10, temperature=0)(PROMPTS)


def test_progress_counts_every_prompt() -> None:
    done: list[int] = []
    sampler(loud(), EOS, 4, batch_tokens=24)(PROMPTS, progress=done.append)
    assert sum(done) == len(PROMPTS)
    assert len(done) > 1
