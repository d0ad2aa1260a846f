"""Rows of a user's own from the command line: mapped columns, mixtures, ratings, and what is said about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_lightning.__main__ import normalize
from rlhf_lightning.runtime.pipeline import as_override, content_digests
from tests.helpers.cli import SMALL, newest, rlhf
from tests.helpers.compose import composed


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
def test_columns_are_keys_of_a_map_that_is_empty() -> None:
    given = ["data.columns.prompt=ask", "data.columns.role.bot=assistant", "data.columns.label=null"]
    assert normalize(normalize(given)) == normalize(given)
    columns = composed("stage=sft", *normalize(given)).data.columns
    assert columns == {"prompt": "ask", "role": {"bot": "assistant"}, "label": None}
    assert as_override("data.columns.prompt", "ask", ["data.columns"]) == "+data.columns.prompt='ask'"
    sources = composed("stage=sft", "data.train=[a.jsonl,org/name:main:train]", "data.weights=[2,1]").data
    assert (list(sources.train), list(sources.weights)) == (["a.jsonl", "org/name:main:train"], [2, 1])
    assert composed("stage=sft", "data.train=data/part-*.jsonl").data.train == "data/part-*.jsonl"


def test_a_pipeline_notices_a_changed_file_of_a_list_a_pattern_and_a_split(tmp_path: Path) -> None:
    files = [write(tmp_path / f"train-{name}.jsonl", [{"text": name}]) for name in "ab"]
    given = [{"data.train": value} for value in (files, [files[0], f"{tmp_path}/*-b.jsonl"], f"{tmp_path}:train-b")]
    before = [content_digests(values) for values in given]
    assert all(before)
    write(tmp_path / "train-b.jsonl", [{"text": "c"}])
    assert all(content_digests(values) != digest for values, digest in zip(given, before, strict=True))
    assert content_digests({"data.train": "org/name:main"}) == []
    held_out, splits = {"evaluate.preferences": files[0]}, {"evaluate.preferences": "val"}
    assert len(content_digests(held_out, splits)) == 1
    assert content_digests(held_out) == []  # no key of data
    file = next(iter(held_out.values()))
    named = {"evaluate.answers.mine": file, "evaluate.models.mine": file}
    assert content_digests(named, {"evaluate.answers": "val"}) == content_digests(held_out, splits)  # of a map


@pytest.mark.slow
@pytest.mark.xdist_group("cli")
def test_a_mixture_of_mapped_rows_is_learned_and_its_counts_are_told(tmp_path: Path) -> None:
    for name, count in (("a", 12), ("b", 4)):
        turns = [[{"who": i, "role": "bot", "content": f"Red {i}."}] for i in range(count)]
        write(tmp_path / f"{name}.jsonl", [{"ask": "Say red.", "say": turn, "id": 3} for turn in turns])
    given = [
        "stage=sft", "data.train=[a.jsonl,b.jsonl]", "data.weights=[1,1]", "data.columns.prompt=ask", *SMALL,
        "data.columns.response=say", "data.columns.role.bot=assistant", "data.batch_size=4", "callbacks.samples=null",
    ]  # fmt: skip
    done = rlhf(tmp_path, *given)
    assert "an epoch has 8 rows of a.jsonl, 8 rows of b.jsonl\n" in done.stdout
    assert "columns of data.train that are not read, metadata for rewards: id, response[].who\n" in done.stdout
    run = newest(tmp_path, "sft")
    assert json.loads((run / "metrics.json").read_text())["global_step"] == 4
    logged = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [logged.Scalars(f"data/{name}.jsonl")[0].value for name in "ab"] == [8, 8]
    wrong = rlhf(tmp_path, *given, "data.columns.prompt=aks", "name=wrong", code=2)
    assert wrong.stderr == (
        "rlhf: a.jsonl, row 1: data.columns.prompt=aks: there is no aks; the row has ask, say, id. Did you mean 'ask'?\n"
    )
