"""Reference log-probabilities of a data set, computed once and kept on disk by content."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from rlhf_lightning.data.base import RowData
from rlhf_lightning.errors import UserError
from rlhf_lightning.files import atomic_path
from rlhf_lightning.models.completion import CompletionModel, response_logprobs
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.ops.groups import GroupBatch, Layout
from rlhf_lightning.ops.ranking import count_each

ROWS = 2048  # whose responses are read at a time


class CachedReference:
    """Looks up log pi_ref of every response of a data module by the row numbers of a batch.

    Args:
        reference: the model at the start of training.
        data: its rows; the table of a split is (rows, K), on disk under `data.cache_dir`.
        layout: what the reference computes correctly.

    Raises:
        UserError: a data module whose rows cannot be computed ahead.
    """

    def __init__(self, reference: Frozen[CompletionModel], data: Any, layout: Layout) -> None:
        if not isinstance(data, RowData):
            raise UserError("dpo.reference=cached reads the rows of a PreferenceData; with another loader use live")
        if data.window is not None:
            raise UserError("dpo.reference=cached needs all rows at once, data.window reads them in parts; use live")
        weights = _weights_hash(reference.model)
        self.tables: dict[str, Tensor] = {}
        for split, rows in data.rows.items():
            path = data.cache_dir / "reference" / f"{weights[:16]}-{rows.key}.npy"
            if not path.is_file():
                table = _compute(reference, data, split, layout)
                with atomic_path(path) as temporary, temporary.open("wb") as file:
                    np.save(file, table, allow_pickle=False)
            self.tables[split] = torch.from_numpy(np.load(path, allow_pickle=False))

    def __call__(self, batch: GroupBatch, split: str) -> Tensor:
        """Return log pi_ref of each response (S,), summed over its tokens in the loss mask."""
        sizes = count_each(batch.group_of, batch.groups)
        place = torch.arange(batch.sequences, device=sizes.device) - (sizes.cumsum(0) - sizes)[batch.group_of]
        table = self.tables[split] = self.tables[split].to(sizes.device)  # stays there
        return table[batch.index[batch.group_of], place]


def _compute(reference: Frozen[CompletionModel], data: RowData, split: str, layout: Layout) -> np.ndarray:
    rows = data.rows[split]
    device = next(reference.model.parameters()).device
    parts: list[list[float]] = []
    with Progress(*Progress.get_default_columns(), transient=True) as bar:
        task = bar.add_task(f"reference log-probabilities ({split})", total=len(rows))
        for begin in range(0, len(rows), ROWS):  # not all rows in memory
            groups = [data.group(split, row) for row in range(begin, min(begin + ROWS, len(rows)))]
            logprobs = response_logprobs(
                reference, groups, layout, device, tokens=4 * data.row_tokens, progress=lambda n: bar.advance(task, n)
            )
            parts += [[tokens.sum().item() for tokens in responses] for responses in logprobs]
    table = np.zeros((len(rows), max(map(len, parts))), dtype=np.float32)
    for row, sums in enumerate(parts):
        table[row, : len(sums)] = sums
    return table


def _weights_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
