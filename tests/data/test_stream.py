"""Rows that come window by window: each once a pass, resumable at any batch, the same steps on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf_lightning import DemonstrationData, PreferenceData, PromptData
from rlhf_lightning.data.sources import Source, read_source
from rlhf_lightning.data.stream import Windows
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_tokenizer
from tests.helpers.cli import SMALL, newest, rlhf
from tests.helpers.lightning import stub_trainer
from tests.modules.offline import start


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(start(tmp_path_factory.mktemp("stream")))


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"say {i}", "response": "red " * (i % 5 + 1)} for i in range(count)]


def loader(
    tokenizer: Any,
    train: Any,
    steps: int = 100,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    limit: int | float = 1.0,
    **options: Any,
) -> Any:
    data = DemonstrationData(tokenizer, train, **{"batch_size": 4, "window": 8, **options})
    more = {"accumulate_grad_batches": accumulate, "limit_train_batches": limit, "max_steps": steps}
    data.trainer = stub_trainer(rank, world_size, **more)
    data.setup()
    return data.train_dataloader(), data


def places(data: Any, batches: Iterator[Any]) -> Iterator[list[int]]:
    """Yield the numbers of the rows of each batch, counted from 0 in the source."""
    for batch in batches:
        yield [int(data.rows["train"].where(row).split()[-1]) - 1 for row in numbers(batch)]


def numbers(batch: Any) -> list[int]:
    return [group.index for group in batch.groups]


def test_every_pass_reads_every_row_once_in_another_order(tokenizer: Any) -> None:
    batches, data = loader(tokenizer, rows(20))
    found = list(islice(places(data, iter(batches)), 15))
    first, second = ([row for step in part for row in step] for part in (found[:5], found[5:10]))
    assert [len(step) for step in found[:5]] == [4, 4, 4, 4, 4]  # windows of 8, 8 and 4 rows
    assert sorted(first) == sorted(second) == list(range(20))
    assert sorted(first[:8]) == list(range(8))  # shuffled within the window
    assert first[:8] != list(range(8))
    assert first != second
    assert found == list(islice(places(*loader(tokenizer, rows(20))[::-1]), 15))  # decided by the seed


@pytest.mark.slow
@pytest.mark.parametrize("taken", range(1, 12))
def test_a_resumed_loader_goes_on_after_any_batch(taken: int, tokenizer: Any) -> None:
    batches, data = loader(tokenizer, rows(20))
    whole = list(islice(places(data, iter(batches)), 14))
    batches, data = loader(tokenizer, rows(20))
    running = places(data, iter(batches))
    assert list(islice(running, taken)) == whole[:taken]
    state = json.loads(json.dumps(batches.state_dict()))
    again, data = loader(tokenizer, rows(20))
    again.load_state_dict(state)
    assert list(islice(places(data, iter(again)), 14 - taken)) == whole[taken:]


@pytest.mark.slow
def test_ranks_share_the_steps_and_have_as_many_batches(tokenizer: Any) -> None:
    alone = list(islice(places(*loader(tokenizer, rows(20))[::-1]), 10))
    shared = [list(islice(places(*loader(tokenizer, rows(20), rank=r, world_size=2)[::-1]), 10)) for r in range(2)]
    assert [sorted(a + b) for a, b in zip(*shared, strict=True)] == [sorted(step) for step in alone]
    # one step more than the run: Lightning would take a run that ended with its loader for a finished one
    assert len(loader(tokenizer, rows(20), steps=7, accumulate=2)[0]) == 16


def test_only_one_window_is_read_before_the_first_batch(tokenizer: Any) -> None:
    read = []

    def source() -> Iterator[tuple[str, dict[str, Any]]]:
        for number in range(10**9):
            read.append(number)
            yield f"row {number + 1}", {"prompt": "say red", "response": "red"}

    windows = Windows(Source("endless", "", source, lambda: None), to_group(tokenizer), 8, "error", False)
    found = windows.after(0)
    assert [len(next(found)[1]) for _ in range(3)] == [8, 8, 8]
    assert len(read) == 24


def to_group(tokenizer: Any) -> Any:
    return DemonstrationData(tokenizer, []).to_group


@pytest.mark.slow
def test_bad_rows_stop_the_run_or_are_left_out_wherever_they_are(tokenizer: Any) -> None:
    broken = rows(20)
    broken[13] = {"prompt": "say 13"}
    batches, data = loader(tokenizer, broken)
    with pytest.raises(UserError, match="row 14: there is no response"):
        list(islice(places(data, iter(batches)), 5))
    batches, data = loader(tokenizer, broken, on_bad_row="skip")
    found = [row for step in islice(places(data, iter(batches)), 5) for row in step]
    assert sorted(found) == [row for row in range(20) if row != 13]
    with pytest.raises(UserError, match="no usable row"):
        loader(tokenizer, [{"prompt": "no response"}] * 4, on_bad_row="skip")


@pytest.mark.slow
def test_shards_and_hub_data_sets_are_not_read_ahead(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in range(3):
        part = "".join(json.dumps(row) + "\n" for row in rows(20)[shard * 7 : (shard + 1) * 7])
        (tmp_path / f"train-{shard}.jsonl").write_text(part)
    batches, data = loader(tokenizer, str(tmp_path))
    found = [b for batch in islice(iter(batches), 5) for b in numbers(batch)]
    assert len(found) == 20
    (tmp_path / "train-2.jsonl").write_text("not JSON, and not reached")
    streamed = Windows(read_source(str(tmp_path), "train", stream=True), to_group(tokenizer), 8, "error", False)
    begin, first = next(streamed.after(0))
    assert (begin, len(first)) == (0, 8)

    def load_dataset(name: str, streaming: bool) -> Any:
        assert streaming
        return datasets.IterableDatasetDict({"train": datasets.Dataset.from_list(rows(20)).to_iterable_dataset()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    batches, data = loader(tokenizer, "somebody/rows")
    assert sorted(row for step in islice(places(data, iter(batches)), 5) for row in step) == list(range(20))


def test_what_does_not_go_with_windows_says_so(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data\.window=9 must be a multiple of data\.batch_size=8"):
        PreferenceData(tokenizer, [], window=9)
    with pytest.raises(UserError, match=r"data\.num_workers=0"):
        PreferenceData(tokenizer, [], window=8, num_workers=2)
    data = PromptData(tokenizer, [{"prompt": "say red"}], window=8)
    data.setup("predict")
    with pytest.raises(UserError, match=r"data\.window is for training"):
        data.predict_dataloader()


@pytest.mark.nightly
@pytest.mark.slow
def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(20)))
    given = ["stage=sft", "data.train=rows.jsonl", "data.window=8", "data.batch_size=4", "schedule=constant", *SMALL]
    given.append("callbacks.checkpoint.every_n_steps=1")
    rlhf(tmp_path, *given, "max_steps=2", "name=short")
    rlhf(tmp_path, *given, "max_steps=4", f"resume={newest(tmp_path, 'sft')}", "name=longer")
    (longer,) = (tmp_path / "outputs" / "sft" / "longer").iterdir()
    assert json.loads((longer / "metrics.json").read_text())["global_step"] == 4
