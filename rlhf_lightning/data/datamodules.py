"""LightningDataModules that turn rows into batches of completion groups or prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from rlhf_lightning.data import records
from rlhf_lightning.data.base import RowData
from rlhf_lightning.data.planning import MicroBatch
from rlhf_lightning.errors import UserError
from rlhf_lightning.ops.groups import Group, GroupBatch


@dataclass
class PromptBatch:
    """Prompts to answer: token ids, the text of the last user turn, the row's other columns, the row numbers."""

    prompt_ids: list[list[int]]
    prompts: list[str]
    metadata: list[dict[str, Any]]
    index: list[int]
    ptx: GroupBatch | None = None

    def to(self, device: torch.device | str, **kwargs: Any) -> PromptBatch:
        """Return the batch with its tensors on `device`."""
        return replace(self, ptx=self.ptx.to(device, **kwargs)) if self.ptx is not None else self


class DemonstrationData(RowData):
    """Demonstrations for SFT: one response a prompt; preference rows give their chosen response."""

    kind = "demonstrations"

    def to_group(self, row: dict[str, Any]) -> Group:
        record = records.demonstration(row)
        prompt, response, counted = self.template.demonstration(record.content, turns=self.turns)
        records.check_length(len(prompt), self.max_length)
        room = self.max_length - len(prompt)
        return Group(prompt, [response[:room]], [counted[:room]])


class PreferenceData(RowData):
    """Preferences for reward models and DPO: chosen and rejected, or a ranking of K responses."""

    kind = "preferences"

    def to_group(self, row: dict[str, Any]) -> Group:
        record = records.preference(row)
        prompt = self.template.prompt(record.prompt)
        records.check_length(len(prompt), self.max_length)
        room = self.max_length - len(prompt)
        responses = [self.template.response(text)[:room] for text in record.responses]
        if len(set(map(tuple, responses))) == 1:
            raise records.RowError(f"the responses are identical within data.max_length={self.max_length}")
        return Group(prompt, responses, ranks=record.ranks, margin=record.margin, label=record.label)


class PromptData(RowData):
    """Prompts for PPO, RLOO, GRPO and evaluation; `ptx` names demonstrations for the pretraining-mix loss."""

    kind = "prompts"

    def __init__(self, *args: Any, ptx: Any = None, ptx_batch_size: int = 8, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.answered: set[int] = set()  # rows that `predict_dataloader` leaves out
        self.ptx: DemonstrationData | None = None
        if ptx is not None:
            self.ptx = DemonstrationData(
                self.tokenizer, ptx, batch_size=ptx_batch_size, max_length=self.max_length, seed=self.seed,
                row_tokens=self.row_tokens, on_bad_row=self.on_bad_row, cache_dir=self.cache_dir, world=self.world,
                template=self.template.name,
            )  # fmt: skip

    def limit_length(self, context: int | None) -> None:
        super().limit_length(context)
        if self.ptx is not None:
            self.ptx.limit_length(context)

    def setup(self, stage: str = "fit") -> None:
        super().setup(stage)
        if self.ptx is not None:
            self.ptx.setup(stage)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return this rank's batches of the training prompts, in order; the last may be empty, so all have as many."""
        if self.windows is not None:
            raise UserError("data.window is for training; candidates are written as they come, from any number of rows")
        world, rank = self._ranks()
        left = [row for row in range(len(self.rows["train"])) if row not in self.answered]
        parts = [tuple(left[i : i + self.batch_size]) for i in range(0, len(left), self.batch_size)]
        parts += [()] * (-len(parts) % world)
        return self._listed("train", parts[rank::world])

    def to_group(self, row: dict[str, Any]) -> Group:
        record = records.prompt(row)
        prompt = self.template.prompt(record.content)
        records.check_length(len(prompt), self.max_length)
        return Group(prompt, [])

    def collate(self, split: str, micro: MicroBatch) -> PromptBatch:
        rows = self.rows[split]
        found = [records.prompt(rows.raw(row)) for row in micro.rows]
        ptx = None
        if self.ptx is not None and split == "train":
            self.ptx.layout = self.layout
            plan = self.ptx._plan()
            plan.epoch, plan.start = divmod(micro.step, max(plan.steps, 1))
            ptx = self.ptx.collate("train", next(iter(plan)))
        return PromptBatch(
            prompt_ids=[list(rows[row].prompt) for row in micro.rows],
            prompts=[record.text for record in found],
            metadata=[record.metadata for record in found],
            index=list(micro.rows),
            ptx=ptx,
        )
