"""A data module of the user's own, named by the configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.cli import SMALL, newest, rlhf

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("cli")]
SOURCE = """
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from rlhf_lightning import DemonstrationData, Group

class Mine(LightningDataModule):
    def __init__(self, tokenizer, train, batch_size=4):
        super().__init__()
        self.ids, self.count, self.batch_size = tokenizer("say red").input_ids, int(train), batch_size

    def train_dataloader(self):
        rows = [Group(self.ids, [self.ids]) for _ in range(self.count)]
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=list)

class Subclass(DemonstrationData):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
"""


def test_data_modules_of_ones_own_train_a_model(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Say red.", "response": "Red."}\n' * 8)
    rlhf(tmp_path, "stage=sft", "data.train=rows.jsonl", "max_steps=1", *SMALL)
    start = f"init_from={newest(tmp_path, 'sft') / 'model'}"
    mine = ["data._target_=mine.Mine", "allow_targets=[mine.Mine]", "data.train=16", "data.batch_size=4"]
    rlhf(tmp_path, "stage=sft", start, *mine, "name=mine")
    (run,) = (tmp_path / "outputs" / "sft" / "mine").iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["global_step"] == 4
    subclass = ["data._target_=mine.Subclass", "allow_targets=[mine.Subclass]", "data.train=rows.jsonl"]
    rlhf(tmp_path, "stage=sft", start, *subclass, "name=subclass", "max_steps=1")
    refused = rlhf(tmp_path, "stage=sft", start, *mine[:1], *mine[2:], code=2)
    assert "data._target_=mine.Mine is not an allowed target" in refused.stderr
    wrong = [option.replace("mine.Mine", "mine.Nobody") for option in mine]
    assert "data._target_=mine.Nobody cannot be imported" in rlhf(tmp_path, "stage=sft", start, *wrong, code=2).stderr
