"""Continuous batching of transformers on a CPU: the same distribution, limits and ends as the engine in this process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GenerationConfig, LlamaForCausalLM

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.continuous import ContinuousEngine
from rlhf_lightning.generation.engine import Generations
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.models.adapters import add_lora
from rlhf_lightning.models.attention import GROUP_SDPA
from tests.helpers.models import tiny_config
from tests.helpers.vllm_double import logprobs

pytestmark = pytest.mark.slow
PROMPTS, EOS = [[1, 5, 6, 7], [1, 9], [1, 20, 21], [4]], [2, *range(8, 64, 6)]


@pytest.fixture(scope="module")
def lm() -> Any:
    """A model with logits as far apart as a trained one's, whose generation config asks for other things."""
    torch.manual_seed(0)
    made: Any = LlamaForCausalLM(tiny_config(initializer_range=0.2)).eval()
    made.set_attn_implementation(GROUP_SDPA)  # as models are loaded
    made.generation_config = GenerationConfig(repetition_penalty=2.0, top_k=1, max_new_tokens=3, eos_token_id=9)
    return made


def started(lm: Any, eos: Any = EOS, **options: Any) -> ContinuousEngine:
    engine = ContinuousEngine(**options)
    engine.start(lm, eos)
    engine.sync()
    return engine


def test_greedy_responses_are_those_of_the_engine_in_this_process(lm: Any) -> None:
    local, done = LocalEngine(), list[int]()
    local.start(lm, EOS)
    lm.train()
    asked: Any = {"max_new_tokens": 12, "temperature": 0}
    found = started(lm).generate(PROMPTS, 2, progress=done.append, **asked)
    assert lm.training
    assert lm.config._attn_implementation == GROUP_SDPA
    lm.eval()
    expected = local.generate(PROMPTS, 2, **asked)
    assert (found.responses, found.finished) == (expected.responses, expected.finished)
    assert {True, False} == set(found.finished)
    assert sum(done) == len(PROMPTS)
    assert ContinuousEngine().generate([], 2, **asked) == Generations([], [], [])


def test_soft_caps_and_windows() -> None:
    """Hugging Face's sdpa refuses the model, whose window is shorter than the responses."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8, "sliding_window": 8}
    config = Gemma2Config(vocab_size=64, initializer_range=0.5, **sizes, **heads)
    capped: Any = Gemma2ForCausalLM(config).eval()
    capped.set_attn_implementation(GROUP_SDPA)
    local, asked = LocalEngine(), {"max_new_tokens": 16, "temperature": 0}
    local.start(capped, [2])
    assert started(capped, [2]).generate(PROMPTS, **asked).responses == local.generate(PROMPTS, **asked).responses


def test_samples_are_of_the_whole_distribution_at_the_temperature(lm: Any) -> None:
    """Each generation of a prompt draws its own first token, by the model's probabilities."""
    n = 400
    before = torch.get_rng_state()
    found = started(lm).generate([PROMPTS[0], PROMPTS[3]], n, max_new_tokens=1, temperature=1.5, seed_parts=(3,))
    assert torch.equal(torch.get_rng_state(), before)
    for place, prompt in enumerate((PROMPTS[0], PROMPTS[3])):
        with torch.no_grad():
            expected = (lm(torch.tensor([prompt])).logits[0, -1] / 1.5).softmax(-1)
        mine = [response[0] for response in found.responses[place * n : (place + 1) * n]]
        counts = torch.bincount(torch.tensor(mine), minlength=64)
        common = expected * n >= 5
        chi = (((counts - expected * n) ** 2) / (expected * n))[common].sum().item()
        assert chi < 2 * common.sum()  # mean of chi square is the number of cells
        assert len(set(mine)) > 10


def test_a_seed_decides_the_samples_of_a_call(lm: Any) -> None:
    engine = started(lm)

    def sampled(*seed_parts: int, ids: Any = (0, 1, 2, 3)) -> Generations:
        return engine.generate(PROMPTS, 3, max_new_tokens=6, seed_parts=seed_parts, ids=ids)

    first = sampled(1)
    assert sampled(1) == first
    assert sampled(2) != first
    assert sampled(1, ids=(4, 5, 6, 7)) != first  # of another rank
    assert first.logprobs is not None
    assert len({tuple(y) for y in first.responses}) > 8
    for k, (y, values) in enumerate(zip(first.responses, first.logprobs, strict=True)):
        torch.testing.assert_close(values, logprobs(lm, PROMPTS[k // 3], y, 1.0), rtol=1e-4, atol=1e-4)


def test_requests_wait_for_room_in_the_cache(lm: Any) -> None:
    """Two pages for twenty responses: their number and their log-probabilities are right all the same."""
    found = started(lm, batch_tokens=1).generate(PROMPTS, 5, max_new_tokens=6)
    assert found.logprobs is not None
    assert len(found.responses) == 20
    for k, (y, values) in enumerate(zip(found.responses, found.logprobs, strict=True)):
        torch.testing.assert_close(values, logprobs(lm, PROMPTS[k // 5], y, 1.0), rtol=1e-4, atol=1e-4)


def test_truncation_and_the_context(lm: Any) -> None:
    found = started(lm, top_k=2).generate([PROMPTS[0]], 60, max_new_tokens=1)
    assert len({y[0] for y in found.responses}) == 2
    long = started(lm, []).generate([[1] * 125, [1, 5]], 1, max_new_tokens=8)
    assert [len(y) for y in long.responses] == [3, 8]
    assert long.finished == [False, False]


def test_lora_and_weights_that_change(lm: Any) -> None:
    torch.manual_seed(1)
    adapted: Any = add_lora(LlamaForCausalLM(tiny_config(initializer_range=0.2)), r=2)
    engine = started(adapted)
    for _ in range(2):
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.5 * torch.randn_like(parameter))
        engine.sync()
        found = engine.generate([PROMPTS[0]], 1, max_new_tokens=6)
        assert found.logprobs is not None
        adapted.eval()
        expected = logprobs(adapted, PROMPTS[0], found.responses[0], 1.0)
        torch.testing.assert_close(found.logprobs[0], expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_pages_read_wrongly_is_refused(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ContinuousEngine._sample

    def shifted(self: Any, *args: Any, **options: Any) -> Generations:
        found = right(self, *args, **options)
        return Generations(
            found.responses, found.finished, [[value - 1 for value in row] for row in found.logprobs or []]
        )

    monkeypatch.setattr(ContinuousEngine, "_sample", shifted)
    with pytest.raises(UserError, match=r"^sampler=continuous cannot sample LlamaForCausalLM: .*; use sampler=local$"):
        started(lm)


def test_a_failure_is_one_line(lm: Any) -> None:
    engine = started(lm)
    with pytest.raises(UserError, match=r"^sampler=continuous cannot sample LlamaForCausalLM: ") as caught:
        engine.generate([[1, 10_000]], 1, max_new_tokens=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, r"^sampler\.batch_tokens=0 "),
        ({"top_k": -1}, r"top_k=-1 "),
        ({"top_p": 2.0}, r"top_p=2.0 "),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ContinuousEngine(**options)
