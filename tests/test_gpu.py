"""What a GPU computes is what a CPU computes: attention, sampling, one update of every stage, resume.

Runs where CUDA is: `pytest -m gpu`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_lightning import DPO, PPO, SFT, RewardModel
from rlhf_lightning.generation.local import _STATIC, LocalEngine
from rlhf_lightning.models.attention import GROUP_SDPA, varlen
from rlhf_lightning.models.completion import CompletionModel, choose_layout
from rlhf_lightning.ops.groups import Group, GroupList, pack
from rlhf_lightning.ops.masking import group_attention_mask
from rlhf_lightning.ops.seeding import derive_seed
from tests.helpers.models import tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]


def ids(*parts: int | str, size: int) -> list[int]:
    draw = torch.Generator().manual_seed(derive_seed(*parts))
    return torch.randint(3, 64, (size,), generator=draw).tolist()


def groups(count: int, prompt: int, response: int, k: int, *parts: int | str) -> list[Group]:
    """Return groups of different lengths, the longest given."""
    return [
        Group(
            ids("p", g, *parts, size=prompt - g % (prompt // 2 + 1)),
            [ids("y", g, j, *parts, size=response - (g + j) % (response // 2 + 1)) for j in range(k)],
            index=g,
        )
        for g in range(count)
    ]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("heads", "key_heads"), [(8, 8), (8, 2), (9, 3)])
@pytest.mark.parametrize("shape", [(6, 60, 40, 3), (3, 900, 60, 2), (4, 5, 3, 1), (2, 40, 200, 9)])
@pytest.mark.parametrize("size", [64, 128])
def test_varlen_attention_is_attention_in_float64(
    shape: tuple[int, ...], heads: int, key_heads: int, size: int
) -> None:
    """Outputs and gradients; the error is that of bfloat16 inputs."""
    batch = pack(groups(*shape), row_tokens=1200)
    runs = batch.runs
    assert runs is not None
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(len(runs.real), h, size, generator=draw).bfloat16() for h in (heads, key_heads, key_heads)]
    weights = torch.randn(len(runs.real), heads, size, generator=draw)
    exact = [x.double().requires_grad_() for x in inputs]
    repeats = heads // key_heads
    parts = (x.repeat_interleave(r, 1).transpose(0, 1)[None] for x, r in zip(exact, (1, repeats, repeats), strict=True))
    rows = (x.flatten()[runs.real][None] for x in (batch.group_ids, batch.response_ids))
    expected = scaled_dot_product_attention(*parts, attn_mask=group_attention_mask(*rows))[0].transpose(0, 1)
    gradients = torch.autograd.grad((expected * weights.double()).sum(), exact)
    on_gpu = [x.cuda().requires_grad_() for x in inputs]
    found = varlen(*on_gpu, runs.to("cuda"), None)  # type: ignore[call-arg]
    assert relative(found.detach(), expected.detach()) < 6e-3
    for a, b in zip(torch.autograd.grad((found.float() * weights.cuda()).sum(), on_gpu), gradients, strict=True):
        assert relative(a, b) < 1e-2


def model(kind: Any = LlamaForCausalLM, **changes: Any) -> Any:
    """Return a random Llama with few heads, as the loaders leave it."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = kind(tiny_config(**(sizes | {"initializer_range": 0.2, "pad_token_id": 0} | changes)))
    made.set_attn_implementation(GROUP_SDPA)
    return made.train()


@pytest.mark.parametrize("kernel", ["varlen", "dense"])
def test_log_probabilities_are_those_of_the_cpu(kernel: str) -> None:
    """In bfloat16 by varlen attention, in float32 by the dense mask."""
    lm = model().eval()
    batch = pack(groups(5, 30, 20, 3), row_tokens=100)
    with torch.no_grad():
        expected = CompletionModel(copy.deepcopy(lm).double())(batch).logprobs
        on_gpu = lm.cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=kernel == "varlen"):
            assert choose_layout(on_gpu) == ("packed", None)
            assert on_gpu.config._attn_implementation == GROUP_SDPA
            found = CompletionModel(on_gpu)(batch.to("cuda")).logprobs
    worst = (found.double().cpu() - expected.double()).abs().max().item()
    assert worst < (0.15 if kernel == "varlen" else 1e-4)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_sampled_tokens_are_those_of_the_cpu(temperature: float) -> None:
    """In float32, with and without static shapes: the same seeds give the same responses."""
    lm = model(max_position_embeddings=96).eval()
    prompts = [ids("s", i, size=3 + 5 * i) for i in range(6)]
    found = []
    for device, static in (("cpu", False), ("cuda", False), ("cuda", True)):
        place = copy.deepcopy(lm).to(device)
        engine = LocalEngine(static=static)
        engine.start(place, set(range(2, 64, 9)))
        found.append(engine.generate(prompts, 3, max_new_tokens=80, temperature=temperature))
        assert engine.use_static is static
    assert found[0] == found[1]
    assert found[0] == found[2]
    assert len({len(response) for response in found[0].responses}) > 3


def test_static_shapes_hold_under_autocast() -> None:
    lm = model().cuda().eval()
    engine = LocalEngine()
    engine.start(lm, {2})
    with torch.autocast("cuda", torch.bfloat16):
        first = engine.generate([[1, 5, 6], [1, 7]], 4, max_new_tokens=20)
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.mul_(-1)  # an update: a graph must not keep converted weights
        other = engine.generate([[1, 5, 6], [1, 7]], 4, max_new_tokens=20)
    assert _STATIC[lm]
    assert first != other


class Ids:
    eos_ids = frozenset({2})

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def share(prompts: Any, responses: list[str], metadata: Any) -> list[float]:
    return [sum(int(i) % 2 for i in text.split()) / max(len(text.split()), 1) for text in responses]


def online(**options: Any) -> PPO:
    given: dict[str, Any] = {"reward": share, "template": Ids(), "max_new_tokens": 12, "missing_eos_penalty": 0.0}
    return PPO(model, partial(torch.optim.SGD, lr=0.1), **(given | options))


GRPO = {"estimator": "grpo", "kl_in": "loss", "kl_estimator": "k3", "num_generations": 4, "whiten_advantages": False}
STAGES: dict[str, Callable[[], Any]] = {
    "sft": lambda: SFT(model, partial(torch.optim.SGD, lr=0.1)),
    "reward": lambda: RewardModel(
        partial(model, LlamaForSequenceClassification, num_labels=1), partial(torch.optim.SGD, lr=0.1)
    ),
    "dpo": lambda: DPO(model, partial(torch.optim.SGD, lr=0.1)),
    "ppo": lambda: online(ppo_epochs=1),
    "grpo": lambda: online(ppo_epochs=1, **GRPO),
}


def trained(stage: str, device: str, precision: Any = "32-true", steps: int = 2) -> tuple[dict[str, Tensor], dict]:
    """Return the weights after two updates and the metrics of the last."""
    module = STAGES[stage]()
    batches = [
        GroupList([Group(g.prompt, [], index=g.index) for g in made] if stage in ("ppo", "grpo") else made)
        for made in (groups(6, 20, 12, 2, step) for step in range(steps))
    ]
    trainer = Trainer(
        max_epochs=1, accelerator=device, devices=1, precision=precision, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    weights = {name: w.detach().double().cpu() for name, w in module.state_dict().items()}
    return weights, {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_two_updates_are_those_of_the_cpu(stage: str) -> None:
    (expected, on_cpu), (found, on_gpu) = trained(stage, "cpu"), trained(stage, "gpu")
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    for name in on_cpu:
        assert on_gpu[name] == pytest.approx(on_cpu[name], rel=2e-3, abs=2e-4), name


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_trains_close_to_float32(stage: str) -> None:
    module = STAGES[stage]()
    module.configure_model()
    start = {name: weight.detach().double() for name, weight in module.state_dict().items()}
    exact, _ = trained(stage, "gpu", steps=1)
    found, metrics = trained(stage, "gpu", "bf16-mixed", steps=1)
    if stage == "dpo":
        assert metrics["train/loss"] == pytest.approx(math.log(2), abs=1e-3)
    if stage in ("ppo", "grpo"):  # other tokens may be sampled; before the update the policy is the one that sampled
        assert metrics["policy/ratio_max"] == pytest.approx(1, abs=0.1)
        assert metrics["policy/ratio_min"] == pytest.approx(1, abs=0.1)
        return
    change = torch.cat([(exact[n] - start[n]).flatten() for n in exact])
    other = torch.cat([(found[n] - start[n]).flatten() for n in exact])
    assert torch.cosine_similarity(change, other, 0) > 0.97


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_a_run_is_the_same_twice(stage: str) -> None:
    """Bit for bit, in bfloat16: what resume relies on."""
    (first, _), (again, _) = trained(stage, "gpu", "bf16-mixed"), trained(stage, "gpu", "bf16-mixed")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_reward_model_is_built_on_the_device(tmp_path: Path) -> None:
    """Lightning builds with the accelerator as default device; the new head is that of the CPU."""
    from rlhf_lightning.models.loading import load_scalar_model

    model().save_pretrained(tmp_path)
    expected = load_scalar_model(str(tmp_path)).score.weight  # type: ignore[union-attr]
    with torch.device("cuda"):
        found = load_scalar_model(str(tmp_path)).score.weight  # type: ignore[union-attr]
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected)


def test_four_bit_weights_compute_what_they_do_on_the_cpu() -> None:
    """In float32, and in bfloat16 near it; merged for export, they are plain weights on the CPU."""
    pytest.importorskip("bitsandbytes")
    from rlhf_lightning.models.adapters import export_lora, load_with_lora

    lora = {"r": 4, "quantization": "nf4"}
    with torch.device("cuda"):
        lm = load_with_lora(model, lora).eval()
    tokens = torch.tensor([ids("nf4", size=40)])
    with torch.no_grad():
        expected = copy.deepcopy(lm).cpu()(tokens).logits.double()
        assert relative(lm(tokens.cuda()).logits, expected) < 1e-3
        with torch.autocast("cuda", torch.bfloat16):
            assert relative(lm(tokens.cuda()).logits, expected) < 3e-2
        merged = export_lora(lm)
        assert type(merged) is LlamaForCausalLM
        assert not any(p.is_cuda for p in merged.parameters())
        assert relative(merged(tokens).logits, expected) < 1e-4


def test_offload_changes_no_bit_and_leaves_the_reference_in_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = trained("ppo", "gpu")
    module = online(ppo_epochs=1, offload=True)
    monkeypatch.setitem(STAGES, "ppo", lambda: module)
    found, _ = trained("ppo", "gpu")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    reference = module.reference
    assert reference is not None
    assert reference.device.type == "cpu"
    assert all(tensor.is_pinned() for tensor in reference.tensors())
