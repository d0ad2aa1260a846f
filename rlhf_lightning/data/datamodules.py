"""LightningDataModules that turn rows into batches of completion groups or prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from rlhf_lightning.data import records
from rlhf_lightning.data.base import RowData
from rlhf_lightning.data.pairing import paired
from rlhf_lightning.data.planning import Loader, MicroBatch
from rlhf_lightning.data.sources import Source
from rlhf_lightning.errors import UserError
from rlhf_lightning.ops.groups import Group, GroupList


class DemonstrationData(RowData):
    """Demonstrations for SFT: one response per prompt; preference rows give their chosen response."""

    kind = "demonstrations"

    def to_group(self, row: dict[str, Any]) -> Group:
        record = records.demonstration(row, self.columns)
        turns = records.learned_turns(record.content, self.turns)
        prompt, response, loss_mask, differs = self.template.conversation(record.content, turns, record.tools)
        records.check_length(len(prompt), self.max_length)
        room = self.max_length - len(prompt)
        return Group(prompt, [response[:room]], [loss_mask[:room]], differs=differs)


class PreferenceData(RowData):
    """Preferences for reward models and DPO: chosen and rejected, or a ranking of K responses.

    Args:
        keep_rows: the groups have the other columns of their rows as `metadata`, as prompts do.
        Others: see :class:`RowData`.
    """

    kind = "preferences"

    def __init__(self, *args: Any, keep_rows: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keeps_rows = keep_rows

    def prepare(self, source: Source) -> Source:
        """Return the rows with rated single responses to equal prompts as rankings."""
        return paired(source, self.columns)

    def to_group(self, row: dict[str, Any]) -> Group:
        record = records.preference(row, self.columns)
        prompt, answers, differs = self.template.completions(record.prompt, record.responses, record.tools)
        records.check_length(len(prompt), self.max_length)
        room = self.max_length - len(prompt)
        responses = [answer[:room] for answer in answers]
        if len(set(map(tuple, responses))) == 1:
            raise records.RowError(f"the responses are identical within data.max_length={self.max_length}")
        return Group(
            prompt, responses, ranks=record.ranks, margin=record.margin, label=record.label, annotators=record.group,
            differs=differs,
        )  # fmt: skip

    def group(self, split: str, row: int) -> Group:
        group = super().group(split, row)
        return replace(group, metadata=self.rows[split].raw(row)) if self.keeps_rows else group


class PromptData(RowData):
    """Prompts for PPO, RLOO, GRPO, candidates and evaluation.

    Args:
        ptx: demonstrations for the pretraining-mix loss, a source like `train`; `ptx_batch_size` rows per step.
        done: called when the prediction loader is made, on every rank; its row numbers are left out.
        Others: see :class:`RowData`.
    """

    kind = "prompts"
    keeps_rows = True

    def __init__(
        self,
        *args: Any,
        ptx: Any = None,
        ptx_batch_size: int = 8,
        done: Callable[[], Collection[int]] = frozenset,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.done = done
        self.ptx: DemonstrationData | None = None
        if ptx is not None:
            self.ptx = DemonstrationData(
                self.tokenizer, ptx, batch_size=ptx_batch_size, max_length=self.max_length, seed=self.seed,
                row_tokens=self.row_tokens, on_bad_row=self.on_bad_row, cache_dir=self.cache_dir, world=self.world,
                template=self.template.name,
            )  # fmt: skip

    def setup(self, stage: str = "fit") -> None:
        super().setup(stage)
        if self.ptx is not None:
            self.ptx.setup(stage)

    def predict_dataloader(self) -> Loader:
        """Return this rank's batches of the training prompts in order, as many on every rank; the last may be empty."""
        if self.windows is not None:
            raise UserError("data.window is for training; candidates are written as they come, from any number of rows")
        rank, world_size = self._ranks()
        done = self.done()
        left = [row for row in range(len(self.rows["train"])) if row not in done]
        parts = [tuple(left[i : i + self.batch_size]) for i in range(0, len(left), self.batch_size)]
        parts += [()] * (-len(parts) % world_size)
        return self._listed("train", parts[rank::world_size])

    def to_group(self, row: dict[str, Any]) -> Group:
        record = records.prompt(row, self.columns)
        prompt, _, differs = self.template.completions(record.content, [], record.tools)
        records.check_length(len(prompt), self.max_length)
        return Group(prompt, [], differs=differs)

    def group(self, split: str, row: int) -> Group:
        """Return the prompt of a row as a group without responses, with what rewards read."""
        record = records.prompt(self.rows[split].raw(row), self.columns)
        return replace(self.rows[split][row], text=record.text, metadata=record.metadata)

    def collate(self, split: str, micro: MicroBatch) -> GroupList:
        batch = super().collate(split, micro)
        if self.ptx is not None and split == "train":
            plan = self.ptx._plan()
            plan.epoch, plan.start = divmod(micro.step, max(plan.steps, 1))
            batch.ptx = self.ptx.collate("train", next(iter(plan)))
        return batch


KINDS = {f"{cls.__module__}.{cls.__qualname__}": cls.kind for cls in (DemonstrationData, PreferenceData, PromptData)}
"""Data module -> the kind of rows it reads."""
