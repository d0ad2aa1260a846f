"""Reference log-probabilities of a data set, computed once and kept on disk by content."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from rlhf_lightning.data.planning import token_budget
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.completion import CompletionModel
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.ops.groups import pack
from rlhf_lightning.ops.logprobs import sequence_sum


def attach_references(reference: Frozen[CompletionModel], data: Any) -> None:
    """Give every split of the data module `data` the log-probabilities (rows, K) of its responses."""
    if data.window is not None:
        raise UserError("dpo.reference=cached needs all rows at once, data.window reads them in parts; use live")
    weights = _weights_hash(reference.model)
    for split, rows in data.rows.items():
        path = Path(data.cache_dir) / "reference" / f"{weights[:16]}-{rows.key}.npy"
        if not path.is_file():
            _write(path, _compute(reference, data, split))
        data.set_reference(split, np.load(path, allow_pickle=False))


def _compute(reference: Frozen[CompletionModel], data: Any, split: str) -> np.ndarray:
    rows = data.rows[split]
    device = next(reference.model.parameters()).device
    widest = max(len(rows[i].responses) for i in range(len(rows)))
    table = np.zeros((len(rows), widest), dtype=np.float32)
    batches = token_budget(rows.tokens, 4 * data.row_tokens)
    for chosen in track(batches, description=f"reference log-probabilities ({split})"):
        groups = [rows[i] for i in chosen]
        batch = pack(groups, data.row_tokens, layout=data.layout).to(device)
        sums = sequence_sum(reference(batch).logprobs, batch.sequence_ids, batch.sequences).cpu().tolist()
        for i, group in zip(chosen, groups, strict=True):
            found, sums = sums[: len(group.responses)], sums[len(group.responses) :]
            table[i, : len(found)] = found
    return table


def _weights_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, table: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, table, allow_pickle=False)
    os.replace(temporary, path)
