"""What the data modules share: reading, tokenizing once, planning whole optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset

from rlhf_lightning.data.layouts import Columns, unread_columns
from rlhf_lightning.data.mixture import JoinedRows, epoch_order
from rlhf_lightning.data.planning import Loader, MicroBatch, PlannedLoader, StepPlan, limited
from rlhf_lightning.data.records import KINDS
from rlhf_lightning.data.sources import WORLD, Source, read_source, several
from rlhf_lightning.data.stream import WindowLoader, Windows
from rlhf_lightning.data.template import Template
from rlhf_lightning.data.tokenize import TokenizedRows, tokenize
from rlhf_lightning.distributed import data_ranks
from rlhf_lightning.errors import UserError
from rlhf_lightning.ops.groups import Group, GroupList, token_budget

LOOKED_AT = 100
"""Rows in which columns that are not read are looked for at every start."""
Rows = TokenizedRows | JoinedRows
CACHE = Path.home() / ".cache" / "rlhf_lightning"


class _Batches(Dataset[Any]):
    """Turns a planned microbatch into what `collate` makes of its rows."""

    def __init__(self, collate: Callable[[MicroBatch], Any]) -> None:
        self.collate = collate

    def __getitem__(self, micro: MicroBatch) -> Any:
        return self.collate(micro)


class RowData(LightningDataModule):
    """What the three data modules share: reading, tokenizing once, planning whole optimizer steps.

    Loaders yield a :class:`GroupList` per microbatch, which the module packs.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        train, val: a file, pattern of files, folder, hub name, list of rows, list of sources, a :class:`Source`, or
            "world" for the built-in world; `val=None` is no validation.
        weights: proportions in which the rows of several sources of `train` are drawn; None draws every row once.
        columns: the data's names of columns and roles, see :class:`Columns`.
        batch_size: rows per optimizer step, over all ranks and accumulated microbatches.
        max_length: longest prompt plus response in tokens.
        row_tokens: token budget of a packed row.
        seed: decides the order of rows.
        template: "auto" (the tokenizer's chat template), "chatml", "human_assistant" or "plain".
        turns: learn the "last" assistant turn or "all" of them.
        on_bad_row: "error" stops at a bad row, "skip" counts it.
        train_rows, val_rows: read only the first rows.
        window: training rows read, tokenized and shuffled at a time, for data that is not to be kept on disk; None
            reads all rows once. A run over windows is as long as the Trainer's `max_steps`.
        num_workers: processes that prepare batches.
        cache_dir: where tokenized rows are kept, by content hash.
        world: options of the built-in world, see docs/world.md.
        context: tokens the model can read; a larger `max_length` is cut to it.
    """

    kind = ""
    keeps_rows = False
    prefetch: bool | None = None
    """Whether a thread packs the next batch while this one is trained on; None is on an accelerator."""

    def __init__(
        self,
        tokenizer: Any,
        train: Any,
        val: Any = None,
        *,
        weights: Sequence[float] | None = None,
        columns: Mapping[str, Any] | None = None,
        batch_size: int = 8,
        max_length: int = 1024,
        row_tokens: int = 1024,
        seed: int = 0,
        template: str = "auto",
        turns: str = "last",
        on_bad_row: str = "error",
        train_rows: int | None = None,
        val_rows: int | None = None,
        window: int | None = None,
        num_workers: int = 0,
        cache_dir: str | Path = CACHE,
        world: dict[str, Any] | None = None,
        context: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("max_length", max_length), ("row_tokens", row_tokens)):
            if not isinstance(value, int):
                raise UserError(f"data.{name}={value} is not a whole number")
        if batch_size < 1 or max_length < 2 or row_tokens < 1:
            raise UserError(
                f"data.batch_size={batch_size}, data.max_length={max_length} and data.row_tokens={row_tokens} must be "
                "positive"
            )
        if on_bad_row not in ("error", "skip"):
            raise UserError(f"data.on_bad_row={on_bad_row!r} is not one of: error, skip")
        if window is not None and (window < 1 or window % batch_size or num_workers):
            raise UserError(
                f"data.window={window} must be a multiple of data.batch_size={batch_size}, with data.num_workers=0"
            )
        self.window, self.windows = window, None
        self.tokenizer, self.weights, self.columns = tokenizer, weights, Columns(columns)
        self.given = {"train": train, "val": val}
        if val is None:  # Lightning validates only where the hook is overridden
            self.val_dataloader = super().val_dataloader
        self.limits = {"train": train_rows, "val": val_rows}
        self.batch_size, self.row_tokens = batch_size, row_tokens
        self.max_length = min(max_length, context or max_length)
        self.seed, self.turns, self.on_bad_row = seed, turns, on_bad_row
        self.num_workers, self.cache_dir = num_workers, Path(cache_dir)
        self.world = dict(world or {})
        self.template = Template(tokenizer, template)
        self.sources: dict[str, Source] = {}
        self.as_given: dict[str, Source] = {}
        self.rows: dict[str, Rows] = {}

    def source(self, split: str) -> Source:
        """Return where the rows of "train" or "val" come from."""
        if split not in self.sources:
            stream = split == "train" and self.window is not None
            world = {"seed": self.seed} | self.world
            weights = self.weights if split == "train" else None
            source = read_source(
                self.given[split], split, self.limits[split], self.kind, world, stream=stream, weights=weights
            )
            self.as_given[split] = source
            if source.parts and not stream:
                source = several([self.prepare(part) for part in source.parts], source.name, source.weights)
            self.sources[split] = source if stream or source.parts else self.prepare(source)
        return self.sources[split]

    def prepare(self, source: Source) -> Source:
        """Return a source whose rows are read as a whole, with what comes before its rows are tokenized."""
        return source

    def setup(self, stage: str = "fit") -> None:
        """Read and tokenize each split once; later starts open the cache."""
        for split, given in self.given.items():
            if given is None or split in self.rows:
                continue
            if split == "train" and self.window is not None:
                self.windows = Windows(self.source(split), self.to_group, self.window, self.on_bad_row, self.keeps_rows)
                self.rows[split] = next(self.windows.after(0))[1]  # what is checked before the first step
            else:
                source = self.source(split)
                rows = [self._tokenized(part) for part in source.parts or (source,)]
                names = [part.name for part in source.parts]
                self.rows[split] = JoinedRows(rows, names, source.weights) if names else rows[0]

    def _tokenized(self, source: Source) -> TokenizedRows:
        return tokenize(
            source,
            self.to_group,
            cache_dir=self.cache_dir,
            parts=self.cache_key(),
            on_bad_row=self.on_bad_row,
            keep_raw=self.keeps_rows,
        )

    def notes(self) -> list[str]:
        """Return lines about the training rows: what an epoch draws, and what the first rows have that is not read."""
        split = "train" if self.given["train"] is not None else "val"
        rows, lines = self.rows.get(split), []
        if isinstance(rows, JoinedRows):
            lines = ["an epoch has " + ", ".join(f"{count} rows of {name}" for name, count in rows.drawn().items())]
        unread: set[str] = set()
        if not self.source(split).name.startswith(WORLD):
            for _, row in islice(self.as_given[split].rows(), LOOKED_AT):
                unread |= unread_columns(row, self.columns, KINDS[self.kind])
        if unread:
            lines.append(
                f"columns of data.{split} that are not read, metadata for rewards: {', '.join(sorted(unread))}"
            )
        return lines

    def to_group(self, row: dict[str, Any]) -> Group:
        """Return the group of a raw row, or raise a `RowError`."""
        raise NotImplementedError

    def cache_key(self) -> list[Any]:
        """Everything besides the rows that decides their tokens."""
        return [type(self).__name__, self.columns.key, self.template.key, self.max_length, self.turns]

    @property
    def accumulate(self) -> int:
        """Microbatches per optimizer step on each rank: the Trainer's `accumulate_grad_batches`."""
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    @property
    def limit(self) -> int | float:
        """The Trainer's `limit_train_batches`, which `overfit_batches` and `fast_dev_run` set, too."""
        return self.trainer.limit_train_batches if self.trainer else 1.0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the training rows; over windows, of the run."""
        if self.windows is None:
            return self._plan(limit=self.limit).steps
        assert self.trainer is not None
        return min(self.trainer.max_steps, ceil(limited(self._window_batches(), self.limit) / self.accumulate))

    def _window_batches(self) -> int:
        assert self.trainer is not None
        return (self.trainer.max_steps + 1) * self.accumulate  # one more step: a finished run can be extended

    def _plan(self, rows: Rows | None = None, limit: int | float = 1.0) -> StepPlan:
        rank, world_size = self._ranks()
        rows = self.rows["train"] if rows is None else rows
        in_order = getattr(self.trainer, "overfit_batches", 0) > 0  # the same rows in every epoch
        order = None
        if isinstance(rows, JoinedRows) and rows.weights and not in_order:
            order = partial(epoch_order, rows.sizes, rows.weights, self.seed)
        return StepPlan(
            rows.tokens, rows.loss_tokens, self.batch_size, self.accumulate, rank, world_size, not in_order, self.seed,
            order, limit,
        )  # fmt: skip

    def _ranks(self) -> tuple[int, int]:
        return data_ranks(self.trainer) if self.trainer else (0, 1)

    def train_dataloader(self) -> PlannedLoader | WindowLoader:
        """Return the resumable loader of this rank."""
        plan = self._plan(limit=self.limit)
        if plan.batch_size < plan.parts:
            raise UserError(
                f"data.batch_size={plan.batch_size} rows cannot fill {plan.parts} microbatches per step "
                f"(trainer.accumulate_grad_batches={self.accumulate} on {plan.parts // self.accumulate} devices)"
            )
        if not plan.whole:
            raise UserError(
                f"data.train has {len(self.rows['train'])} rows, fewer than {plan.parts} microbatches per step"
            )
        if isinstance(self.rows["train"], JoinedRows) and self.trainer is not None:
            for logger in self.trainer.loggers:
                logger.log_metrics({f"data/{name}": n for name, n in self.rows["train"].drawn().items()}, step=0)
        if self.windows is not None:
            if getattr(self.trainer, "reload_dataloaders_every_n_epochs", 0):
                raise UserError(
                    "data.window goes on through its rows without epochs; leave out reload_dataloaders_every_n_epochs"
                )
            return WindowLoader(self.windows, self._plan, self._collate_window, self._window_batches())
        if self.trainer is not None:  # not 0 where Lightning reloads, or fits once more
            plan.epoch = self.trainer.current_epoch
        dataset = _Batches(lambda micro: self.collate("train", micro))
        return PlannedLoader(dataset, plan, self.num_workers, self._pack_ahead())

    def _pack_ahead(self) -> Callable[[Any], Any] | None:
        """Return what prepares the next batch in a thread, None where that saves no time."""
        trainer = self.trainer
        module = getattr(trainer, "lightning_module", None)
        if trainer is None or module is None or not module.automatic_optimization:  # else it packs what it samples
            return None
        wanted = trainer.strategy.root_device.type != "cpu" if self.prefetch is None else self.prefetch
        return getattr(module, "pack_ahead", None) if wanted else None

    def _collate_window(self, rows: TokenizedRows, micro: MicroBatch) -> Any:
        self.rows["train"] = rows  # the window that row numbers belong to
        return self.collate("train", micro)

    def val_dataloader(self) -> Loader | list[Any]:
        """Return this rank's validation batches, in a fixed order, each within a token budget.

        Every rank has the same number of them: the last one is repeated with weights of 0, which enters no metric.
        """
        rank, world_size = self._ranks()
        batches = token_budget(self.rows["val"].tokens, 4 * self.row_tokens)
        repeats = -len(batches) % world_size
        batches += [batches[-1]] * repeats
        last = rank >= world_size - repeats
        return self._listed("val", batches[rank::world_size], repeats=int(last))

    def test_dataloader(self) -> Loader:
        """Refuse: other held-out rows are `val` of another data module."""
        raise UserError(
            "Trainer.test: this data module has train and val rows only; Trainer.validate reads val, which may be a "
            "data module of other rows: Trainer.validate(module, <data module with val=these rows>)"
        )

    def _listed(self, split: str, batches: Sequence[Sequence[int]], repeats: int = 0) -> Loader:
        """Return a loader of the given rows, batch by batch; the last `repeats` batches have weights of 0."""
        weights = [None] * (len(batches) - repeats) + [0.0] * repeats
        micros = [MicroBatch(tuple(batch), w, w, step=0) for batch, w in zip(batches, weights, strict=True)]
        return Loader(_Listed(micros, lambda micro: self.collate(split, micro)))

    def where(self, split: str, rows: Sequence[int]) -> str:
        """Return where `rows` come from, for a message."""
        return f"{self.source(split).name}, " + ", ".join(self.rows[split].where(row) for row in rows)

    def group(self, split: str, row: int) -> Group:
        """Return the group of a row."""
        return self.rows[split][row]

    def collate(self, split: str, micro: MicroBatch) -> GroupList:
        """Return the groups of a planned microbatch with its weights."""
        groups = [self.group(split, row) for row in micro.rows]
        return GroupList(groups, self.row_tokens, micro.per_token, micro.per_group, places=micro.places)


class _Listed(_Batches):
    """A sized list of planned batches."""

    def __init__(self, micros: Sequence[MicroBatch], collate: Callable[[MicroBatch], Any]) -> None:
        super().__init__(collate)
        self.micros = micros

    def __len__(self) -> int:
        return len(self.micros)

    def __getitem__(self, index: Any) -> Any:
        return self.collate(self.micros[index])
