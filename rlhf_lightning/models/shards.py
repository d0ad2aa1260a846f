"""Sharded tensors of a checkpoint on disk: a safetensors file per rank, read on any number of ranks.

torch.distributed.checkpoint is not used: it describes its files in a pickle, and its safetensors writer holds a second
and a third copy of what it writes.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.files import regular

SHARDS, SUFFIX = "shards", ".shards"
"""Where a checkpoint names the folder of its shards, and how those folders end."""


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return what this rank holds of a tensor, and where that begins in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    (chunk,) = tensor.__create_chunk_list__()
    return tensor.to_local(), tuple(chunk.offsets)


def slices(starts: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Return the slices of the part of a tensor that has `shape` and begins at `starts`."""
    return tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))


def take_tensors(checkpoint: dict[str, Any], kind: type[Tensor] = Tensor) -> dict[str, Any]:
    """Move the tensors of a kind out of a checkpoint: model.<name>, and optimizer.<number>.<parameter>.<key>."""
    taken: dict[str, Any] = {}

    def without(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
        found = {key: value for key, value in values.items() if isinstance(value, kind)}
        taken.update({f"{prefix}.{key}": value for key, value in found.items()})
        return {key: value for key, value in values.items() if key not in found}

    checkpoint["state_dict"] = without("model", checkpoint["state_dict"])
    states = checkpoint.get("optimizer_states", [])
    for number, saved in enumerate(states):
        kept = {place: without(f"optimizer.{number}.{place}", state) for place, state in saved["state"].items()}
        states[number] = saved | {"state": kept}
    return taken


def put_tensors(checkpoint: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put tensors back where :func:`take_tensors` took them from."""
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            checkpoint["state_dict"][rest] = tensor
        else:
            number, place, key = rest.split(".", 2)
            checkpoint["optimizer_states"][int(number)]["state"].setdefault(int(place), {})[key] = tensor


def index(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Return name -> [shape, dtype, name that it is written by], which :func:`read_whole` reads tensors by."""
    names = written_by(tensors)
    return {name: [list(t.shape), str(t.dtype).removeprefix("torch."), names[name]] for name, t in tensors.items()}


def written_by(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return name -> the name that a tensor is written by: tied ones share their memory and are written once."""
    first: dict[tuple[int, Any], str] = {}
    locals_ = {name: local_part(tensor)[0] for name, tensor in tensors.items()}
    return {name: first.setdefault((t.data_ptr() or id(t), t.shape), name) for name, t in locals_.items()}


def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, of a sharded one this rank's part, into `tensor`."""
    local, at = local_part(tensor)
    local.copy_(whole[slices(at, local.shape)])


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what this rank holds of `tensors`, with the places where it begins."""
    parts = {name: local_part(tensors[name]) for name in written_by(tensors).values()}
    held = {name: (local.detach().contiguous(), at) for name, (local, at) in parts.items() if local.numel()}
    starts = json.dumps({name: at for name, (_, at) in held.items()})
    save_file({name: local for name, (local, _) in held.items()}, file, metadata={"starts": starts})


@torch.no_grad()
def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors`, of sharded ones this rank's part, from the files of all ranks that wrote them.

    Raises:
        UserError: a file is damaged, or some of a tensor is in none of them.
    """
    missing = {name: local_part(tensor)[0].numel() for name, tensor in tensors.items()}
    seen: set[tuple[str, tuple[int, ...]]] = set()
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(regular(file), "pt") as opened:
                starts = json.loads((opened.metadata() or {})["starts"])
                for name in tensors.keys() & starts.keys():
                    begin = tuple(starts[name])
                    if (name, begin) not in seen:
                        missing[name] -= _copy_overlap(opened.get_slice(name), begin, *local_part(tensors[name]))
                    seen.add((name, begin))
    except (SafetensorError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint's shards in {folder} cannot be read: {reason}") from error
    if lacking := next((name for name, left in missing.items() if left), None):
        raise UserError(f"the checkpoint's shards in {folder} are incomplete: some of {lacking} is in none of them")


def _copy_overlap(source: Any, begin: tuple[int, ...], local: Tensor, at: tuple[int, ...]) -> int:
    """Copy into `local`, which begins at `at`, what of it a saved part has that begins at `begin`; return how much."""
    ranges = list(zip(begin, source.get_shape(), at, local.shape, strict=True))
    low = tuple(max(a, b) for a, _, b, _ in ranges)
    high = tuple(min(a + n, b + m) for a, n, b, m in ranges)
    shape = tuple(max(end - start, 0) for start, end in zip(low, high, strict=True))
    count = math.prod(shape) if local.numel() else 0
    if count:
        there, here = (tuple(a - b for a, b in zip(low, origin, strict=True)) for origin in (begin, at))
        local[slices(here, shape)] = source[slices(there, shape)].to(local)
    return count


def shard_folder(path: str | Path, checkpoint: Mapping[str, Any]) -> Path | None:
    """Return the folder of a checkpoint's shards, None of a checkpoint that is one file.

    Raises:
        UserError: it names no folder beside it.
    """
    if SHARDS not in checkpoint:
        return None
    name = str(checkpoint[SHARDS].get("folder")) if isinstance(checkpoint[SHARDS], dict) else ""
    folder = Path(path).parent / name
    if Path(name).name != name or not name.endswith(SUFFIX) or not folder.is_dir():
        raise UserError(f"the checkpoint {path} needs the folder {name} beside it, which is not there")
    return folder


def read_whole(path: str | Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint with the whole tensors of its shards, if it has any, on the CPU."""
    folder = shard_folder(path, checkpoint)
    if folder is None:
        return checkpoint
    tensors, size = {}, sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    entries = checkpoint.pop(SHARDS)["tensors"]
    for name, (shape, dtype, _) in {entry[2]: entries[entry[2]] for entry in entries.values()}.items():
        size -= math.prod(shape)  # an element has a byte or more
        if size < 0 or not isinstance(kind := getattr(torch, str(dtype), None), torch.dtype):
            raise UserError(f"the checkpoint's shards in {folder} are incomplete: {name} has shape {shape}, {dtype}")
        tensors[name] = torch.empty(shape, dtype=kind)
    read_shards(folder, tensors)
    put_tensors(checkpoint, {name: tensors[entry[2]] for name, entry in entries.items()})
    return checkpoint


def in_one_file(path: Any) -> Any:
    """Return the path of a checkpoint in one file, or what such a file of a sharded checkpoint would contain."""
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return path
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if SHARDS not in checkpoint:
        return path
    whole = io.BytesIO()
    torch.save(read_whole(path, checkpoint), whole)
    whole.seek(0)
    return whole


def remove_shards(path: Path, keep: str | None = None) -> None:
    """Remove the folders of a checkpoint's shards but `keep`: of one that was replaced, and of killed writes."""
    for folder in path.parent.iterdir():
        if folder.name.startswith(f"{path.name}.") and folder.name.endswith(SUFFIX) and folder.name != keep:
            shutil.rmtree(folder, ignore_errors=True)
