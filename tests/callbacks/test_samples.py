"""What lands in samples/ and in TensorBoard's text tab, and that nothing a model writes can disturb it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from rlhf_lightning import DPO, SFT, RewardModel
from rlhf_lightning.callbacks.samples import Samples, as_markdown, clean
from rlhf_lightning.data.base import RowData
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.modules.base import StageModule
from rlhf_lightning.ops.groups import Group
from tests.helpers.lightning import quiet_lightning
from tests.modules import bandit
from tests.modules.offline import classifier, sgd

ROWS = [{"prompt": f"p{i}", "response": "r```\x1b[31m", "reward": 0.5, "finished": True} for i in range(5)]


class Shown(StageModule):
    """Has the given rows to show, after the first batch only where `late`."""

    def __init__(self, rows: list[dict[str, Any]], late: bool = False) -> None:
        super().__init__(lambda: nn.Linear(1, 1), sgd())
        self.weight, self.rows, self.late, self.asked = nn.Parameter(torch.ones(1)), rows, late, 0

    def trained_model(self) -> Any:
        return self

    def pack(self, batch: Any) -> Any:
        return batch

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.late = False
        return self.weight.sum()

    def text_samples(self, count: int, max_new_tokens: int, engine: Engine) -> list[dict[str, Any]]:
        self.asked += 1
        return [] if self.late else self.rows[:count]

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(4, 1))


def fit(folder: Path, callback: Samples, module: LightningModule, steps: int = 5) -> list[str]:
    """Train and return the names of the files in samples/."""
    logger = TensorBoardLogger(str(folder), name="", version="tensorboard", default_hp_metric=False)
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=logger, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback], log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module)
    return sorted(path.name for path in (folder / "samples").glob("*"))


@quiet_lightning
def test_samples_are_written_to_the_folder_and_as_text(tmp_path: Path) -> None:
    files = fit(tmp_path, Samples(tmp_path / "samples", every_n_steps=2, count=3), Shown(ROWS))
    assert files == [f"step_00000{step}.jsonl" for step in (0, 2, 4, 5)]  # before the first update and after the last
    rows = [json.loads(line) for line in (tmp_path / "samples" / files[0]).read_text().splitlines()]
    assert rows == ROWS[:3]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    texts = events.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [0, 2, 4, 5]
    text = texts[0].tensor_proto.string_val[0].decode()
    assert text.count("```") == 2 * 3  # the fences are ours
    assert "\x1b" not in text
    assert "reward 0.500, finished True" in text


@quiet_lightning
def test_samples_begin_with_the_first_there_are(tmp_path: Path) -> None:
    files = fit(tmp_path, Samples(tmp_path / "samples", every_n_steps=2), Shown(ROWS, late=True))
    assert files == [f"step_00000{step}.jsonl" for step in (1, 3, 5)]


@quiet_lightning
def test_only_the_first_and_the_last_without_a_number_of_steps(tmp_path: Path) -> None:
    files = fit(tmp_path, Samples(tmp_path / "samples", every_n_steps=0), Shown(ROWS))
    assert files == ["step_000000.jsonl", "step_000005.jsonl"]


@quiet_lightning
def test_a_module_without_text_writes_no_samples(tmp_path: Path) -> None:
    assert not fit(tmp_path, Samples(tmp_path / "samples", every_n_steps=1), Shown([]))
    assert not (tmp_path / "samples").exists()


@quiet_lightning
def test_a_model_that_cannot_be_sampled_from_is_trained_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Refuses(Shown):
        def text_samples(self, count: int, max_new_tokens: int, engine: Engine) -> list[dict[str, Any]]:
            super().text_samples(count, max_new_tokens, engine)
            raise UserError("no cache")

    caplog.set_level(logging.WARNING)
    module = Refuses(ROWS)
    assert not fit(tmp_path, Samples(tmp_path / "samples", every_n_steps=3), module)
    assert module.asked == 3  # not at every batch
    assert module.global_step == 5
    assert {record.getMessage() for record in caplog.records if "rlhf" in record.name} == {
        "no samples are written: no cache"
    }


# ---- what each stage shows ---------------------------------------------------------------------------------------------


class Ids(RowData):
    """A tokenizer, a template and a data module in one: token ids as text."""

    eos_ids = frozenset({2})

    def __init__(self) -> None:
        LightningDataModule.__init__(self)
        self.template = self.tokenizer = self
        self.rows = {"train": [], "val": [Group([1, 5 + i], [[8, 2], [9, 9 + i, 2]]) for i in range(3)]}

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))


def with_data(module: Any) -> Any:
    """Build the module's model and attach a Trainer that has :class:`Ids` as data."""
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module.configure_model()
    module.trainer.datamodule = Ids()
    return module.train()


@quiet_lightning
@pytest.mark.parametrize("stage", [SFT, DPO])
def test_responses_to_held_out_prompts_leave_the_training_untouched(stage: Any, tiny_lm: LlamaForCausalLM) -> None:
    module = with_data(stage(lambda: tiny_lm, sgd()))
    before = torch.get_rng_state()
    rows = module.text_samples(2, 6, LocalEngine())
    assert torch.equal(before, torch.get_rng_state())
    assert tiny_lm.training
    assert [row["prompt"] for row in rows] == ["1 5", "1 6"]
    assert all(1 <= len(row["response"].split()) <= 6 for row in rows)
    assert rows == module.text_samples(2, 6, LocalEngine())  # the same prompts, seeds and weights
    module.trainer.datamodule.rows = {"train": module.trainer.datamodule.rows["val"][2:]}
    assert [row["prompt"] for row in module.text_samples(2, 6, LocalEngine())] == ["1 7"]


@quiet_lightning
def test_a_reward_model_shows_the_scores_of_held_out_responses() -> None:
    module = with_data(RewardModel(classifier, sgd()))
    rows = module.text_samples(2, 6, LocalEngine())
    assert module.training
    assert [(row["prompt"], row["response"], row["rank"]) for row in rows] == [
        ("1 5", "8 2", 0), ("1 5", "9 9 2", 1), ("1 6", "8 2", 0), ("1 6", "9 10 2", 1),
    ]  # fmt: skip
    with torch.no_grad():
        expected = classifier()(torch.tensor([[1, 6, 9, 10, 2]])).logits[0, 0].item()
    assert rows[3]["score"] == pytest.approx(expected, rel=1e-5)


@quiet_lightning
def test_ppo_shows_its_last_rollout() -> None:
    module = bandit.build()
    assert module.text_samples(2, 6, LocalEngine()) == []
    bandit.fit(module, bandit.Prompts(2))
    rows = module.text_samples(2, 6, LocalEngine())
    assert len(rows) == 2
    assert set(rows[0]) == {"prompt", "response", "reward", "finished"}


def test_modules_without_data_have_none() -> None:
    for module in (SFT(bandit.load, sgd()), DPO(bandit.load, sgd()), RewardModel(classifier, sgd())):
        module.configure_model()
        assert module.text_samples(2, 6, LocalEngine()) == []


# ---- text a model wrote ------------------------------------------------------------------------------------------------


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


def test_markdown_wraps_long_lines_and_changes_nothing_else() -> None:
    long = "word " * 60
    text = as_markdown({"prompt": "a  b\n\n  c", "response": long, "gold": 1.0})
    prompt, _, rest = text.removeprefix("```\n").partition("\n---\n")
    response = rest.partition("\n```\n")[0]
    assert prompt == "a  b\n\n  c"
    assert max(map(len, response.split("\n"))) <= 88
    assert response.replace("\n", "") == long
