"""`rlhf stage=export`: the rows of a data source as files, the built-in world's in every layout."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from rlhf_lightning.data.sources import read_source
from rlhf_lightning.errors import UserError
from rlhf_lightning.files import write_json, write_jsonl
from rlhf_lightning.runtime.run import Run


def run(run: Run) -> float | None:
    """Write <kind>/train.jsonl and <kind>/val.jsonl below `export.folder`, a row of the source per line."""
    settings, folder = run.settings, Path(run.options["folder"])
    data = settings["data"]
    world = {"seed": settings["seed"]} | (data.get("world") or {})
    if data["train"] != "world":
        raise UserError(f"data.train={data['train']} is already a file or a hub name; stage=export writes data=world")
    kinds = [world["records"]] if world.get("records") else run.options["kinds"]
    metrics: dict[str, int] = {}
    for kind in kinds:
        sizes = {}
        for split in ("train", "val"):
            limit = data[f"{split}_rows"]
            source = read_source("world", split, limit, kind, world | {"records": None})
            rows = [row for _, row in source.rows()]
            write_jsonl(folder / kind / f"{split}.jsonl", rows)
            sizes[split] = metrics[f"{kind}/{split}"] = len(rows)
        Console().print(
            f"{kind:15} {sizes['train']} train, {sizes['val']} val rows  {folder / kind}",
            highlight=False,
            soft_wrap=True,
        )
    write_json(run.folder / "metrics.json", {"monitor": None, **metrics})
    return None
