"""Predictions on disk: every rank appends to its own shard; at the end they are merged into one file, in order."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from rlhf_lightning.files import atomic_path


class ShardWriter(BasePredictionWriter):
    """Appends each batch's rows to `folder/<rank>.jsonl`, and reads which rows are there already.

    A prediction is a dict: `row` is its number in the data module's `train`, `value` what becomes a line of the file.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__("batch")
        self.folder = Path(folder)
        self.done: set[int] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask the first rank which rows are done, before any rank writes."""
        done = list(places(self.folder)) if trainer.is_global_zero else []
        self.done = set(trainer.strategy.broadcast(done))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = (self.folder / f"{trainer.global_rank}.jsonl").open("a", encoding="utf-8")
        if self.file.tell():
            self.file.write("\n")  # ends a line that a kill cut off

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: list[dict[str, Any]],
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        self.file.writelines(json.dumps(row, default=str) + "\n" for row in prediction)
        self.file.flush()
        os.fsync(self.file.fileno())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.file.close()


def places(folder: Path) -> dict[int, tuple[Path, int]]:
    """Return for every whole row of the shards its file and the byte where its line begins."""
    lines: dict[int, tuple[Path, int]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        begin = 0
        with path.open("rb") as file:
            for line in file:
                with suppress(ValueError):  # blank, or cut off
                    lines[json.loads(line)["row"]] = (path, begin)
                begin += len(line)
    return lines


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of all shards, `row` and `value`, in order."""
    lines = places(folder)
    files = {path: path.open("rb") for path in {path for path, _ in lines.values()}}
    try:
        for number in sorted(lines):
            path, begin = lines[number]
            files[path].seek(begin)
            yield json.loads(files[path].readline())
    finally:
        for file in files.values():
            file.close()


def merge(folder: Path, target: Path) -> Iterator[dict[str, Any]]:
    """Yield the values of all shards in order, each after it was written to `target`, which appears when all are."""
    with atomic_path(target) as temporary, temporary.open("w", encoding="utf-8") as written:
        for line in read(folder):
            written.write(json.dumps(line["value"]) + "\n")
            yield line["value"]


def remove(folder: Path) -> None:
    """Remove the shards."""
    shutil.rmtree(folder, ignore_errors=True)
