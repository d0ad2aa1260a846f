"""What lands in TensorBoard and in samples/, and that nothing a model writes can disturb it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from rlhf_lightning import RewardModel
from rlhf_lightning.callbacks.tensorboard import Samples, as_markdown, clean, judged_by, write_hparams
from rlhf_lightning.ops.groups import Group
from tests.helpers.lightning import quiet_lightning
from tests.modules.offline import classifier, sgd


class Small(LightningModule):
    """Logs a falling loss; carries the samples of a rollout when given any."""

    def __init__(self, samples: list[dict[str, Any]] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.samples_seen = samples or []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("val/loss", 1.0 / (1 + self.global_step))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(4, 1))


def train(folder: Path, callbacks: list[Any], module: LightningModule | None = None, steps: int = 4) -> Trainer:
    logger = TensorBoardLogger(str(folder), name="", version="tensorboard", default_hp_metric=False)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module or Small())
    return trainer


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def fit(folder: Path, callback: Any, module: LightningModule | None = None, steps: int = 4) -> EventAccumulator:
    train(folder, [callback], module, steps)
    return read(folder)


@quiet_lightning
def test_hparams_tab_has_the_settings_and_the_final_metric(tmp_path: Path) -> None:
    given = {"optimizer.lr": 0.1, "stage": "sft", "lora": None, "packed": True, "betas": [0.9, 0.99], "steps": 3}
    trainer = train(tmp_path, [])
    write_hparams(trainer, given, "val/loss", 0.25)
    events = read(tmp_path)
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    shown = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert shown == {
        "optimizer.lr": 0.1, "stage": "sft", "lora": "None", "packed": True, "betas": "[0.9, 0.99]", "steps": 3,
    }  # fmt: skip
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    listed = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos
    assert [info.name.tag for info in listed] == ["hparams/val/loss"]  # TensorBoard shows only metrics listed here
    assert [event.value for event in events.Scalars("hparams/val/loss")] == [pytest.approx(0.25)]
    assert "hp_metric" not in events.Tags()["scalars"]


@quiet_lightning
def test_hparams_without_a_metric_writes_nothing(tmp_path: Path) -> None:
    write_hparams(train(tmp_path, []), {"a": 1}, None, 0.0)
    assert not [tag for tag in read(tmp_path).summary_metadata if tag.startswith("_hparams_")]


def test_a_run_without_held_out_rows_is_judged_by_its_training() -> None:
    assert judged_by("val/reward", {"val/reward": 1, "reward/proxy": 2}) == "val/reward"
    assert judged_by("val/reward", {"reward/proxy": 2}) == "reward/proxy"
    assert judged_by("val/accuracy", {"train/accuracy": 2}) == "train/accuracy"
    assert judged_by("kl", {"train/loss": 2}) is None


ROWS = [{"prompt": f"p{i}", "response": "r```\x1b[31m", "reward": 0.5, "finished": True} for i in range(5)]


@quiet_lightning
def test_rollouts_are_written_to_the_folder_and_as_text(tmp_path: Path) -> None:
    events = fit(tmp_path, Samples(tmp_path / "samples", every_n_steps=2, count=3), Small(ROWS), steps=5)
    files = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert files == ["step_000001.jsonl", "step_000003.jsonl", "step_000005.jsonl"]  # the first and the last, too
    rows = [json.loads(line) for line in (tmp_path / "samples" / files[0]).read_text().splitlines()]
    assert rows == ROWS[:3]
    texts = events.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [1, 3, 5]
    text = texts[0].tensor_proto.string_val[0].decode()
    assert text.count("```") == 2 * 3  # the fences are ours
    assert "\x1b" not in text
    assert "reward 0.500, finished True" in text


@quiet_lightning
def test_a_module_without_text_writes_no_samples(tmp_path: Path) -> None:
    events = fit(tmp_path, Samples(tmp_path / "samples", every_n_steps=1))
    assert not (tmp_path / "samples").exists()
    assert "samples/text_summary" not in events.Tags()["tensors"]


class Ids:
    """A tokenizer, a template and a data module in one: token ids as text."""

    eos_ids = frozenset({2})

    def __init__(self) -> None:
        self.template = self.tokenizer = self
        self.rows = {"train": [], "val": [Group([1, 5 + i], [[8, 2], [9, 9 + i, 2]]) for i in range(3)]}

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))


def test_answers_to_held_out_prompts_leave_the_training_untouched(tiny_lm: LlamaForCausalLM, tmp_path: Path) -> None:
    tiny_lm.train()
    module: Any = type("Module", (), {"policy": type("Policy", (), {"lm": tiny_lm})})
    trainer: Any = type("Trainer", (), {"datamodule": Ids()})
    callback = Samples(tmp_path, count=2, max_new_tokens=6)
    before = torch.get_rng_state()
    rows = callback.sample(trainer, module)
    assert torch.equal(before, torch.get_rng_state())
    assert tiny_lm.training
    assert [row["prompt"] for row in rows] == ["1 5", "1 6"]
    assert all(1 <= len(row["response"].split()) <= 6 for row in rows)
    assert rows == callback.sample(trainer, module)  # the same prompts, draws and weights


def test_a_reward_model_shows_the_scores_of_held_out_responses(tmp_path: Path) -> None:
    module = RewardModel(classifier, sgd())
    module.configure_model()
    trainer: Any = type("Trainer", (), {"datamodule": Ids()})
    rows = Samples(tmp_path, count=2).sample(trainer, module.train())
    assert module.training
    assert [(row["prompt"], row["response"], row["rank"]) for row in rows] == [
        ("1 5", "8 2", 0), ("1 5", "9 9 2", 1), ("1 6", "8 2", 0), ("1 6", "9 10 2", 1),
    ]  # fmt: skip
    with torch.no_grad():
        expected = classifier()(torch.tensor([[1, 6, 9, 10, 2]])).logits[0, 0].item()
    assert rows[3]["score"] == pytest.approx(expected, rel=1e-5)


def test_clean_strips_what_forges_lines_and_cuts_what_is_long() -> None:
    assert clean("a\tb\nc") == "a\tb\nc"
    for bad in "\x00\x1b\r\x7f\x9b\u2028\u2029\u202e\u2066":
        assert clean(f"a{bad}b") == "a�b"
    assert "```" not in clean("a```b````")
    assert clean("x" * 10, limit=10) == "x" * 10
    assert clean("x" * 11, limit=10) == "x" * 9 + "…"


def test_markdown_keeps_everything_the_model_wrote_inside_the_fence() -> None:
    text = as_markdown({"prompt": "```\n# Title", "response": "<script>```", "gold": -0.25})
    assert text.startswith("```\n'''\n# Title\n---\n<script>'''\n```\n")
    assert text.endswith("gold -0.250")
