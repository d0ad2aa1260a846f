"""4-bit weights under LoRA: what they compute, what learns, what is saved, merged and read again."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from rlhf_lightning import DPO, PPO, SFT, DemonstrationData, PreferenceData, RewardModel
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapters import Adapter, add_lora, export_lora, is_quantized, load_model, quantizable
from rlhf_lightning.models.completion import CompletionModel
from rlhf_lightning.models.folder import write_model
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer
from rlhf_lightning.ops.groups import Group, pack
from rlhf_lightning.runtime.memory import BYTES_OF_4_BITS
from tests.helpers.lightning import quiet_lightning
from tests.helpers.models import tiny_config
from tests.modules import bandit
from tests.modules.offline import adam, demonstrations, fit, preferences, start

pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is absent: pip install 'rlhf-lightning[qlora]'")
import bitsandbytes

from rlhf_lightning.models.four_bit import Linear4bit, dequantize, quantize

NF4: dict[str, Any] = {"r": 4, "quantization": "nf4"}
CODE = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""The 16 values of NF4 (arXiv 2305.14314 appendix E)."""
IDS = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 10, 11, 2]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def disturb(model: nn.Module, std: float = 0.1) -> Any:
    """Give every weight that is trained an effect far above rounding."""
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * std)
    return model


def plain(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a copy with the weights that 4 bits can hold."""
    rounded = copy.deepcopy(model)
    quantize(rounded)
    dequantize(rounded)
    return rounded


@pytest.mark.parametrize("bias", [True, False])
def test_weights_are_the_nearest_values_of_nf4(bias: bool) -> None:
    """Each is a scale of its block of 64 times a value of the code; the scale has 8 bits, so it is near the largest."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 96, bias=bias)
    found = Linear4bit(layer).dequantized()
    blocks, given = found.weight.data.view(-1, 64), layer.weight.data.view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    assert ((scales / given.abs().amax(1, keepdim=True)) - 1).abs().max() < 0.05
    values = torch.tensor(CODE)
    codes = ((blocks / scales)[..., None] - values).abs()
    assert codes.amin(-1).max() < 1e-6
    exact = (given / given.abs().amax(1, keepdim=True))[..., None] - values
    assert (codes.argmin(-1) == exact.abs().argmin(-1)).all()
    assert found.bias is layer.bias


def test_it_computes_with_these_weights_whatever_was_called_before(
    tiny_lm: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients of a plain model with the de-quantized weights, in the precision of the call."""
    computed: list[torch.dtype] = []
    matmul: Any = getattr(bitsandbytes, "matmul_4bit")  # noqa: B009  not in its __all__
    monkeypatch.setattr(
        bitsandbytes, "matmul_4bit", lambda x, *args, **kwargs: computed.append(x.dtype) or matmul(x, *args, **kwargs)
    )
    expected = plain(tiny_lm)
    layer, linear = Linear4bit(tiny_lm.model.layers[0].mlp.up_proj), expected.model.layers[0].mlp.up_proj
    x = torch.randn(7, 32)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        for training in (False, True):
            mine, theirs = x.clone().requires_grad_(training), x.clone().requires_grad_(training)
            layer.train(training)
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
                torch.set_grad_enabled(training),
            ):
                found, right = layer(mine), linear(theirs)
            assert found.dtype == right.dtype == computed[-1] == dtype
            torch.testing.assert_close(found, right, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)
            if training:
                found.float().sum().backward()
                right.float().sum().backward()
                torch.testing.assert_close(
                    mine.grad, theirs.grad, rtol=0, atol=1e-6 if dtype == torch.float32 else 5e-2
                )


def test_the_model_is_the_plain_one_with_rounded_weights(tiny_lm: LlamaForCausalLM) -> None:
    before, expected = logits(tiny_lm), logits(plain(tiny_lm))
    model = add_lora(tiny_lm, **NF4)
    assert is_quantized(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)  # B is 0 at the start
    assert (expected - before).abs().max() > 1e-3
    kinds = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert kinds == {"base_layer"}
    assert type(tiny_lm.lm_head) is nn.Linear


def test_gradients_reach_the_adapter_alone(tiny_lm: LlamaForCausalLM) -> None:
    """They are those of LoRA on the plain model with rounded weights."""
    twin = disturb(add_lora(plain(tiny_lm), r=4))
    model = add_lora(tiny_lm, **NF4)
    model.load_state_dict({name: tensor for name, tensor in twin.state_dict().items() if "base_layer" not in name})
    for one in (model, twin):
        one.train()(IDS).logits.square().mean().backward()
    found, expected = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, twin))
    assert found.keys() == expected.keys() == {n for n, _ in model.named_parameters() if ".lora_" in n}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_heads_and_named_layers_keep_their_precision() -> None:
    lm, scorer = LlamaForCausalLM(tiny_config()), LlamaForSequenceClassification(tiny_config(num_labels=1))
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in quantizable(lm)} == kinds
    assert {name.rpartition(".")[2] for name in quantizable(scorer)} == kinds
    assert len(quantizable(lm, ["o_proj", "model.layers.1.mlp.up_proj"])) == 2 * 7 - 2 - 1


def test_weights_need_the_bytes_that_the_plan_says() -> None:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    ))  # fmt: skip
    count = sum(layer.weight.numel() for layer in quantizable(model).values())
    quantize(model)
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    states = [m.state for m in layers]
    used = sum(m.weight.numel() for m in layers) + sum(s.absmax.numel() + 4 * s.state2.absmax.numel() for s in states)
    assert used == pytest.approx(BYTES_OF_4_BITS * count, rel=1e-3)
    assert count == 2 * (4 * 256 * 256 + 3 * 256 * 512)


def test_checkpoints_leave_out_what_the_start_folder_has(tiny_lm: LlamaForCausalLM) -> None:
    start, model = copy.deepcopy(tiny_lm), disturb(add_lora(tiny_lm, **NF4))
    state = model.state_dict()
    assert not [name for name in state if "base_layer" in name]
    assert all(tensor.dtype != torch.uint8 for tensor in state.values())
    resumed = add_lora(start, **NF4)
    resumed.load_state_dict(state)
    assert torch.equal(logits(resumed), logits(model))
    with pytest.raises(RuntimeError, match="base_layer.weight"):  # of LoRA on plain weights
        resumed.load_state_dict(add_lora(LlamaForCausalLM(tiny_config()), r=4).state_dict())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "embed_tokens"]], ids=["all", "some"])
def test_both_exports_are_the_trained_model(tiny_lm: LlamaForCausalLM, tmp_path: Path, targets: Any) -> None:
    """Merged: plain weights, never rounded again. The adapter: read on a model whose weights are rounded as well."""
    folder = start(tmp_path)
    model = disturb(add_lora(load_causal_lm(folder), target_modules=targets, **NF4))
    expected = logits(model)
    merged = export_lora(model)
    assert type(merged) is LlamaForCausalLM
    assert not is_quantized(merged)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert torch.equal(logits(model), expected)  # the trained model is left alone
    for name, exported in (("merged", merged), ("adapter", Adapter(model))):
        write_model(tmp_path / name, exported, load_tokenizer(folder), {})
        assert (tmp_path / name / "adapter_config.json").is_file() is (name == "adapter")
        torch.testing.assert_close(logits(load_causal_lm(str(tmp_path / name))), expected, rtol=0, atol=1e-5)
    config = tmp_path / "adapter" / "config.json"
    assert json.loads(config.read_text())["base_quantization"] == "nf4"
    config.write_text(config.read_text().replace('"nf4"', '"nf5"'))
    with pytest.raises(UserError, match=r"config.json: base_quantization='nf5' is not one of nf4. Did you mean 'nf4'"):
        load_causal_lm(str(tmp_path / "adapter"))


def seeded(load: Any, rounded: bool) -> Any:
    """Return a loader after which LoRA starts with the same weights; `rounded` to plain weights that 4 bits can hold."""

    def loader() -> Any:
        model = load()
        torch.manual_seed(2)
        return plain(model) if rounded else model

    return loader


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
@quiet_lightning
def test_training_is_that_of_lora_on_rounded_weights(stage: str, tmp_path: Path) -> None:
    """The same losses, which fall; DPO starts at ln 2, so its reference has the 4-bit weights as well."""
    folder, cache = start(tmp_path), {"cache_dir": tmp_path / "cache", "batch_size": 8}
    tokenizer, sft = load_tokenizer(folder), stage == "sft"
    load = partial(load_scalar_model if stage == "reward" else load_causal_lm, folder)
    rows: Any = demonstrations(8) if sft else preferences(8)
    data = (DemonstrationData if sft else PreferenceData)(tokenizer, rows, rows, **cache)
    kind: Any = {"sft": SFT, "reward": RewardModel, "dpo": partial(DPO, beta=0.5)}[stage]
    runs: list[list[float]] = []
    for rounded in (False, True):
        lora = {"r": 4} if rounded else NF4
        modules = [kind(seeded(load, rounded), adam(0.03), lora=lora) for _ in range(2)]
        runs.append([fit(m, data, n).callback_metrics[name].item() for m, n, name in
                     zip(modules, (1, 6), ("train/loss", "val/loss"), strict=True)])  # fmt: skip
    assert runs[0] == pytest.approx(runs[1], abs=2e-4)
    assert runs[0][1] < runs[0][0] - 0.05
    if stage == "dpo":
        assert runs[0][0] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.slow
@quiet_lightning
def test_ppo_samples_from_the_quantized_policy() -> None:
    """The same responses, KL and losses as with LoRA on rounded weights; the value head is trained as well."""
    load = partial(bandit.load, hidden_size=32, intermediate_size=64)
    histories = []
    for rounded in (False, True):
        module = bandit.build(seeded(load, rounded), lr=3e-2, lora={"r": 4} if rounded else NF4)
        histories.append(bandit.fit(module, bandit.Prompts(3)).rows)
        assert is_quantized(module.policy.lm) is not rounded
        assert isinstance(module, PPO)
        assert module.policy.value_head.weight.abs().max() > 0
    assert histories[0][0]["kl/reference"] == pytest.approx(0.0, abs=1e-5)
    assert abs(histories[0][-1]["kl/reference"]) > 1e-3
    for found, expected in zip(*histories, strict=True):
        for name in ("reward/proxy", "kl/reference", "policy/loss", "value/loss", "optim/grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-3), name


def test_a_packed_batch_under_autocast_is_near_float32(tiny_lm: LlamaForCausalLM, groups: list[Group]) -> None:
    model = CompletionModel(disturb(add_lora(tiny_lm, **NF4)))
    batch = pack(groups)
    with torch.no_grad():
        exact = model(batch).logprobs
        with torch.autocast("cpu", torch.bfloat16):
            found = model(batch).logprobs
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().mean() < 0.05


def test_weights_are_quantized_on_the_cpu_whatever_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning builds with the accelerator as default device, where full weights may not fit; `meta` stands for it."""
    devices: list[str] = []
    monkeypatch.setattr(PeftModel, "to", lambda self, device: devices.append(device.type) or self)

    def load() -> Any:
        devices.append(torch.empty(1).device.type)
        return LlamaForCausalLM(tiny_config())

    with torch.device("meta"):
        model = load_model(load, NF4)
        load_model(load, None)
    assert devices == ["cpu", "meta", "meta"]  # loaded, moved; loaded
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_what_cannot_work_is_refused(tiny_lm: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter.quantization='fp4' is not one of nf4. Did you mean 'nf4'"):
        add_lora(tiny_lm, quantization="fp4")
    with pytest.raises(UserError, match="float64 cannot be quantized; use model.load.dtype=float32"):
        add_lora(copy.deepcopy(tiny_lm).double(), **NF4)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(UserError, match="GPT2LMHeadModel has no linear layers below its head"):
        add_lora(gpt2, **NF4)  # its layers are Conv1D
    with pytest.raises(UserError, match="dpo.reference=live is the model before its weights were put into 4 bits"):
        DPO(lambda: tiny_lm, adam(), lora=NF4, reference="live")
    DPO(lambda: tiny_lm, adam(), lora={"r": 4}, reference="live")
    with pytest.raises(UserError, match="adapter=qlora cannot be sharded; use strategy=ddp"):
        load_model(lambda: tiny_lm, NF4, defer=True)
    tiny_lm.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True).to_dict()
    tiny_lm.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds quantized weights \(quant_method=bitsandbytes\)"):
        load_causal_lm(str(tmp_path))


@pytest.mark.slow
@quiet_lightning
def test_averages_of_codes_are_refused(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[EMAWeightAveraging()], max_steps=1
    )
    rows = DemonstrationData(load_tokenizer(start(tmp_path)), demonstrations(8), batch_size=8, cache_dir=tmp_path)
    with pytest.raises(UserError, match="EMAWeightAveraging averages every weight, and those of 4 bits are codes"):
        trainer.fit(SFT(partial(load_causal_lm, start(tmp_path)), adam(), lora=NF4), rows)
