"""The shards of a checkpoint: what some ranks wrote, other numbers of ranks read; a file that is not whole is told."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf_lightning.callbacks.checkpoints import AtomicCheckpointIO
from rlhf_lightning.errors import UserError
from rlhf_lightning.models import shards
from rlhf_lightning.models.shards import index, put_tensors, read_shards, read_whole, take_tensors


def cut(size: int, parts: int) -> list[tuple[int, int]]:
    """Return the rows of every rank, as torch.chunk deals them out: the last ranks may have none."""
    step = -(-size // parts)
    return list(pairwise(min(step * rank, size) for rank in range(parts + 1)))


def written(folder: Path, tensors: dict[str, Tensor], ranks: int) -> None:
    """Write tensors as `ranks` ranks do."""
    folder.mkdir(parents=True)
    for rank in range(ranks):
        rows = {name: cut(len(tensor), ranks)[rank] for name, tensor in tensors.items()}
        held = {name: tensors[name][low:high].clone() for name, (low, high) in rows.items() if high > low}
        starts = {name: (rows[name][0], *[0] * (tensors[name].ndim - 1)) for name in held}
        save_file(held, folder / f"{rank:05d}.safetensors", metadata={"starts": json.dumps(starts)})


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {"a": torch.arange(35.0).view(7, 5), "b": torch.arange(3.0), "c": torch.ones(1, 2, dtype=torch.bfloat16)}


@pytest.mark.parametrize("writers", [1, 2, 3, 8])
@pytest.mark.parametrize("readers", [1, 2, 3, 8])
def test_any_number_of_ranks_reads_what_any_number_wrote(
    writers: int, readers: int, tensors: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "x", tensors, writers)
    for rank in range(readers):
        rows = {name: cut(len(tensor), readers)[rank] for name, tensor in tensors.items()}
        mine = {name: torch.full_like(tensors[name][low:high], -1) for name, (low, high) in rows.items()}
        starts = {id(mine[name]): (rows[name][0], *[0] * (mine[name].ndim - 1)) for name in mine}
        monkeypatch.setattr(shards, "local_part", lambda tensor, starts=starts: (tensor, starts[id(tensor)]))
        read_shards(tmp_path / "x", mine)
        for name, (low, high) in rows.items():
            assert torch.equal(mine[name], tensors[name][low:high])


def test_a_part_that_two_ranks_wrote_counts_once(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Otherwise it would stand for a part that no rank wrote."""
    written(tmp_path / "x", tensors, 2)
    (tmp_path / "x" / "00001.safetensors").write_bytes((tmp_path / "x" / "00000.safetensors").read_bytes())
    with pytest.raises(UserError, match="is in none of them"):
        read_shards(tmp_path / "x", {"a": torch.empty(8, 5)})
    read_shards(tmp_path / "x", {"a": torch.empty(4, 5)})


def checkpoint(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the content of a checkpoint's file whose shards are in `folder`."""
    content: dict[str, Any] = {"state_dict": {"plain": torch.ones(2)}, "optimizer_states": [{"state": {}}]}
    content["shards"] = {"folder": folder.name, "tensors": index(tensors)}
    return content


def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}.weight": tensor for name, tensor in tensors.items()} | {
        "optimizer.0.4.exp_avg": tensors["a"]
    }


def test_another_strategy_reads_whole_tensors(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    written(tmp_path / "x.shards", named(tensors), 2)
    path = tmp_path / "last.ckpt"
    torch.save(checkpoint(tmp_path / "x.shards", {k: v.clone() for k, v in named(tensors).items()}), path)
    found = AtomicCheckpointIO().load_checkpoint(path)
    assert found["state_dict"].keys() == {"plain", "a.weight", "b.weight", "c.weight"}
    assert all(torch.equal(found["state_dict"][f"{name}.weight"], tensor) for name, tensor in tensors.items())
    assert torch.equal(found["optimizer_states"][0]["state"][4]["exp_avg"], tensors["a"])
    assert "shards" not in found


def test_tied_tensors_are_written_once_and_read_as_both(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    tied = {"model.embedding": tensors["a"], "model.head": tensors["a"]}
    assert [entry[2] for entry in index(tied).values()] == ["model.embedding", "model.embedding"]
    written(tmp_path / "x.shards", {"model.embedding": tensors["a"]}, 2)
    found = read_whole(tmp_path / "last.ckpt", checkpoint(tmp_path / "x.shards", tied))["state_dict"]
    assert torch.equal(found["head"], tensors["a"])
    assert found["head"] is found["embedding"]


def test_what_is_taken_out_is_put_back(tensors: dict[str, Tensor]) -> None:
    state = {0: {"exp_avg": tensors["a"], "step": 3}, 2: {"exp_avg": tensors["b"]}}
    content: dict[str, Any] = {"state_dict": dict(tensors), "optimizer_states": [{"state": state, "param_groups": []}]}
    taken = take_tensors(content)
    assert (len(taken), content["state_dict"], content["optimizer_states"][0]["state"]) == (
        5,
        {},
        {0: {"step": 3}, 2: {}},
    )
    assert state[0].keys() == {"exp_avg", "step"}  # the optimizer's own, which trains on
    put_tensors(content, taken)
    assert content["state_dict"] == tensors
    assert content["optimizer_states"][0]["state"] == state


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "incomplete: some of model.a.weight is in none of them"),
        ("cut", "cannot be read"),
        ("unmarked", "cannot be read"),
        ("huge", "incomplete: model.a.weight has shape"),
        ("dtype", "incomplete: model.a.weight has shape .* device"),
        ("elsewhere", "needs the folder ../x.shards beside it"),
        ("here", "needs the folder  beside it"),
        ("gone", "needs the folder y.shards beside it"),
        ("other", "needs the folder x beside it"),
    ],
)
def test_damaged_shards_are_told(damage: str, message: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "x.shards"
    for place in (folder, tmp_path / "x.shards", folder.parent / "x"):
        written(place, named(tensors), 2)
    content = checkpoint(folder, {k: v.clone() for k, v in named(tensors).items()})
    file, entries = folder / "00001.safetensors", content["shards"]["tensors"]
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "unmarked":
        save_file({"model.a.weight": tensors["a"]}, file)
    elif damage in ("huge", "dtype"):
        entries["model.a.weight"] = (
            [[10**9, 10**9], "float32", "model.a.weight"] if damage == "huge" else [[7, 5], "device", "model.a.weight"]
        )
    else:
        content["shards"]["folder"] = {"elsewhere": "../x.shards", "here": "", "gone": "y.shards", "other": "x"}[damage]
    with pytest.raises(UserError, match=message):
        read_whole(folder.parent / "last.ckpt", content)


def test_a_new_checkpoint_and_a_removal_take_the_older_shards_away(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    names = ["last.ckpt.1.shards", "last.ckpt.2.shards", "best.ckpt.3.shards"]
    for name in names:
        written(tmp_path / name, named(tensors), 1)
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(checkpoint(tmp_path / names[1], {k: v.clone() for k, v in named(tensors).items()}), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.ckpt.3.shards", "last.ckpt", "last.ckpt.2.shards"]
    assert torch.equal(io.load_checkpoint(path)["state_dict"]["b.weight"], tensors["b"])
    io.remove_checkpoint(path)
    assert [p.name for p in tmp_path.iterdir()] == ["best.ckpt.3.shards"]
    io.save_checkpoint({"state_dict": {}}, tmp_path / "best.ckpt")  # of a run that goes on on one device
    assert [p.name for p in tmp_path.iterdir()] == ["best.ckpt"]
