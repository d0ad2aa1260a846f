"""Sliding windows, soft caps and attention sinks: packed groups are plain forward passes, on every attention path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
)

from rlhf_lightning.models.attention import GROUP_SDPA, HALF, possible_paths, window_of
from rlhf_lightning.models.completion import (
    CompletionModel,
    attention_path,
    choose_layout,
    describe_attention,
    hidden_states,
    short_window,
)
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.ops.groups import Group, pack
from tests.helpers.models import tiny_config
from tests.helpers.plain import bottom_right, exact, flex_on_cpu, gradients, plain_logprobs, same

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}
WINDOW = 5
FAMILIES: dict[str, PretrainedConfig] = {
    "gemma2": Gemma2Config(**SMALL, **BOTH, sliding_window=WINDOW, attn_logit_softcapping=1.5, query_pre_attn_scalar=8),
    "gemma3": Gemma3TextConfig(**SMALL, **BOTH, sliding_window=WINDOW),
    "mistral": MistralConfig(**SMALL, sliding_window=WINDOW),
    "gpt_oss": GptOssConfig(**SMALL, **BOTH, **EXPERTS, sliding_window=WINDOW),
}
CAPPED = ("gemma2", "gpt_oss")


@pytest.fixture(autouse=True)
def none_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_lightning.models.completion._CHOSEN", {})


def build(name: str) -> Any:
    torch.manual_seed(1)
    lm: Any = AutoModelForCausalLM.from_config(FAMILIES[name], attn_implementation="eager").double()
    if name == "gpt_oss":
        lm.set_experts_implementation("eager")
        for layer in lm.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    return exact(lm).double().eval()


def groups() -> list[Group]:
    """One, two and four responses; all but one prompt longer than the window, so are most responses."""
    ids = [3 + (7 * i) % 61 for i in range(200)]
    return [
        Group(ids[:9], [ids[20:29], ids[50:58]]),
        Group(ids[60:67], [ids[70:79]]),
        Group(ids[80:83], [ids[90:93], ids[100:112], ids[120:121], ids[130:138]]),
    ]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for what runs on an accelerator only: the same arithmetic on a CPU."""
    monkeypatch.setattr("rlhf_lightning.models.attention.varlen_attn", bottom_right)
    with flex_on_cpu():
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("name", ["gemma2", pytest.param("gemma3", marks=pytest.mark.nightly), "mistral", "gpt_oss"])
def test_packed_is_plain_under_a_window_shorter_than_the_runs(name: str, kernels: None) -> None:
    """Log-probabilities and every gradient, on all paths, beside one unpadded pass per response.

    Hugging Face's eager attention has a softmax in float32, so the exact comparison is with our attention unpacked.
    """
    lm, made = build(name), groups()
    by_hugging_face = plain_logprobs(lm, made)
    lm.set_attn_implementation(GROUP_SDPA)
    plain = plain_logprobs(lm, made)
    torch.testing.assert_close(plain, by_hugging_face, rtol=0, atol=1e-5)
    weights = torch.linspace(-1, 1, len(plain), dtype=torch.float64)
    expected = gradients(lm, (plain * weights).sum())
    assert choose_layout(lm) == ("packed", None)
    full = CompletionModel(lm)(pack([Group(g.prompt, g.responses) for g in made])).logprobs
    batch = pack(made, 60)
    assert batch.input_ids.shape[0] > 1
    paths: list[Any] = ["dense", "runs", "flex", *(["varlen"] if name not in CAPPED else []), "padded"]
    for path in paths:
        if path != "padded":
            read = pack(made, 60)
            lm.zero_grad()
            hidden = hidden_states(lm, read, path)[read.source]
            logits = CompletionModel(lm).head(hidden)
            found = logits.log_softmax(-1).gather(-1, read.targets[:, None])[:, 0]
        else:
            found = CompletionModel(lm)(pack(made, layout="padded")).logprobs
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-9, msg=path)
        same(gradients(lm, (found * weights).sum()), expected, 1e-9)
    with short_window(lm, lm.config, 40):  # which restricts nothing: the test above is one of windows
        assert window_of(lm.config) == 40
        wide = CompletionModel(lm)(pack(made, 60)).logprobs
    assert (wide - full).abs().max() > 1e-3
    assert window_of(lm.config) == WINDOW


@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_models_are_packed(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those Hugging Face has no sdpa for as well; reading with a cache and left padding is that of eager attention."""
    build(name).float().save_pretrained(tmp_path)
    lm: Any = load_causal_lm(str(tmp_path))
    assert lm.config._attn_implementation == GROUP_SDPA
    assert choose_layout(lm) == ("packed", None)
    assert "per response (float32 on cpu), in a sliding window of 5 tokens" in describe_attention(lm)
    assert attention_path(lm, pack([Group([3] * 90, [[4] * 50])])) == "runs"
    lm.eval()
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6, 7, 8, 9, 10, 12]])
    mask = (ids > 0).long()
    found = []
    for kind in (GROUP_SDPA, "eager"):
        lm.set_attn_implementation(kind)
        with torch.no_grad():
            cached = DynamicCache(config=lm.config)
            first = lm(input_ids=ids[:, :8], attention_mask=mask[:, :8], cache=cached, use_cache=True)
            after = lm(input_ids=ids[:, 8:], attention_mask=mask, cache=cached)
        found.append(torch.cat([first.logits[:, 2:], after.logits], 1))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_window_that_is_not_respected_makes_the_dense_mask_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe shortens the window, however long it is, and puts it back."""
    from rlhf_lightning.models import attention

    lm: Any = AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=4096))
    lm.set_attn_implementation(GROUP_SDPA)
    original = attention.by_runs
    assert choose_layout(lm) == ("packed", None)
    assert "response" in describe_attention(lm)
    monkeypatch.setattr(attention, "by_runs", lambda q, k, v, runs, window, *rest: original(q, k, v, runs, None, *rest))
    assert choose_layout(lm) == ("packed", None)
    assert "dense" in describe_attention(lm)
    assert lm.config.sliding_window == 4096
    monkeypatch.setattr(attention, "group_attention_mask", lambda g, r, p=None, w=None: (g >= 0)[:, None, None, :])
    assert choose_layout(lm)[0] == "padded"


def test_paths_that_a_model_cannot_take_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that raises, forward or backward, is not chosen; one without a backward pass may serve evaluation."""
    lm: Any = AutoModelForCausalLM.from_config(tiny_config(tie_word_embeddings=False))
    lm.set_attn_implementation(GROUP_SDPA)
    monkeypatch.setattr("rlhf_lightning.models.completion.possible_paths", lambda *args: ["varlen", "runs", "dense"])
    monkeypatch.setattr("rlhf_lightning.models.attention.varlen_attn", bottom_right)
    long = pack([Group([3] * 90, [[4] * 50])])

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            raise RuntimeError("no backward pass")

    assert choose_layout(lm.train()) == ("packed", None)
    assert attention_path(lm, long) == "varlen"
    monkeypatch.setattr(
        "rlhf_lightning.models.attention.varlen_attn",
        lambda *args, **options: Forward.apply(bottom_right(*args, **options)),
    )
    choose_layout(lm.train())
    assert attention_path(lm, long) == "runs"
    choose_layout(lm.eval())
    assert attention_path(lm, long) == "varlen"
    lm.model.requires_grad_(False)  # a head that is trained alone
    choose_layout(lm.train())
    assert attention_path(lm, long) == "varlen"
    monkeypatch.setattr("rlhf_lightning.models.attention.varlen_attn", None)
    choose_layout(lm.eval())
    assert attention_path(lm, long) == "runs"


def test_what_is_tried_on_an_accelerator() -> None:
    llama = LlamaConfig(**SMALL)
    assert possible_paths(llama, "cpu", torch.bfloat16) == ["runs", "dense"]
    assert possible_paths(llama, "mps", torch.bfloat16) == ["dense"]
    for dtype in HALF:
        assert possible_paths(llama, "cuda", dtype) == ["varlen", "flex", "dense"]
        assert possible_paths(FAMILIES["gemma2"], "cuda", dtype) == ["flex", "dense"]
        assert possible_paths(LlamaConfig(**SMALL | {"head_dim": 320}), "cuda", dtype) == ["flex", "dense"]
        assert possible_paths(LlamaConfig(**SMALL, attention_dropout=0.1), "cuda", dtype) == ["dense"]
    assert possible_paths(llama, "cuda", torch.float32) == ["flex", "dense"]


class NoReading(TorchDispatchMode):
    """Fails where the host would wait for an accelerator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"), name
        if name in ("index", "index_put", "index_put_"):
            assert not any(x is not None and x.dtype == torch.bool for x in args[1]), "boolean indexing"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["varlen", "flex", "runs", "dense"])
def test_nothing_is_read_back_from_the_device(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward pass of a packed batch, the first with the masks it makes; kernels are stand-ins."""
    lm: Any = AutoModelForCausalLM.from_config(MistralConfig(**SMALL, sliding_window=WINDOW))
    lm.set_attn_implementation(GROUP_SDPA)

    def kernel(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        return q + k.mean() + v.mean()

    monkeypatch.setattr("rlhf_lightning.models.attention.varlen_attn", kernel)
    monkeypatch.setattr("rlhf_lightning.models.flex.compiled", lambda: kernel)
    monkeypatch.setattr("rlhf_lightning.models.completion.attention_path", lambda *args: path)
    batch = pack(groups(), 60)
    with NoReading():
        for _ in range(2):
            CompletionModel(lm)(batch).logprobs.sum().backward()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            batch.input_ids.sum().item()
