"""Several sources: every row once, or drawn in proportion to weights, the same on any number of ranks."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlhf_lightning import DemonstrationData, PromptData
from rlhf_lightning.data.mixture import drawn, epoch_order, interleaved
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_tokenizer
from tests.helpers.lightning import stub_trainer
from tests.modules.offline import start


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(start(tmp_path_factory.mktemp("mixture")))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Three files of 12, 4 and 8 rows."""
    paths = []
    for name, count in (("a", 12), ("b", 4), ("c", 8)):
        rows = [{"prompt": f"say {name} {i}", "response": "red " * (i % 5 + 1), "source": name} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(str(tmp_path / f"{name}.jsonl"))
    return paths


# ---- what an epoch draws ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([12, 4], (), [12, 4]),
        ([12, 4], (1, 1), [8, 8]),
        ([12, 4], (3, 1), [12, 4]),
        ([10, 10], (2, 1), [13, 7]),
        ([1, 1, 1], (1, 1, 4), [1, 0, 2]),  # 0.5, 0.5, 2: the first of equal remainders
        ([5, 5], (1e-9, 1), [0, 10]),
    ],
)
def test_an_epoch_has_as_many_rows_as_there_are_in_proportion(sizes: Any, weights: Any, expected: Any) -> None:
    assert drawn(sizes, weights) == expected
    order = epoch_order(sizes, weights, seed=3, epoch=0)
    edges = np.cumsum([0, *sizes])
    assert [int(((order >= a) & (order < b)).sum()) for a, b in pairwise(edges)] == expected


def test_a_source_is_drawn_pass_after_pass_over_the_epochs() -> None:
    sizes, weights = [12, 4], (1, 1)  # 8 of each per epoch
    orders = [epoch_order(sizes, weights, seed=5, epoch=epoch) for epoch in range(3)]
    assert Counter(np.concatenate(orders)[np.concatenate(orders) < 12].tolist()) == dict.fromkeys(range(12), 2)
    for order in orders:
        assert Counter(order[order >= 12].tolist()) == dict.fromkeys(range(12, 16), 2)
    assert [o.tolist() for o in orders] == [epoch_order(sizes, weights, seed=5, epoch=e).tolist() for e in range(3)]
    assert orders[0].tolist() != epoch_order(sizes, weights, seed=6, epoch=0).tolist()
    assert (np.sort(orders[0]) != orders[0]).any()


def test_a_stream_is_mixed_in_proportion_until_every_source_was_read() -> None:
    sources = [lambda name=name, count=count: iter([f"{name}{i}" for i in range(count)])
               for name, count in (("a", 6), ("b", 2))]  # fmt: skip
    found = list(interleaved(sources, (2, 1)))
    assert [name for name in found if name[0] == "a"] == [f"a{i}" for i in range(6)]
    assert found == list(interleaved(sources, (2, 1)))
    for size in range(3, len(found), 3):
        assert sum(name[0] == "b" for name in found[:size]) == size // 3
    assert {name for name in found if name[0] == "b"} == {"b0", "b1"}
    assert list(interleaved([lambda: iter([1]), lambda: iter([])], (1, 1))) == [1]


# ---- data modules ----------------------------------------------------------------------------------------------------


def places(data: DemonstrationData, loader: Any) -> list[list[str]]:
    """Return for every batch where its rows stand."""
    return [[data.rows["train"].where(group.index) for group in batch.groups] for batch in loader]


def test_files_in_a_list_are_read_as_one_and_each_row_knows_its_file(
    tokenizer: Any, files: list[str], tmp_path: Path
) -> None:
    data = DemonstrationData(tokenizer, files, batch_size=4, cache_dir=tmp_path)
    data.setup()
    assert len(data.rows["train"]) == 24
    batches = places(data, data.train_dataloader())
    found = Counter(place for batch in batches for place in batch)
    assert found == dict.fromkeys((f"{f}, row {i}" for f, n in zip(files, (12, 4, 8), strict=True)
                                   for i in range(1, n + 1)), 1)  # fmt: skip
    assert data.notes() == [
        f"an epoch has 12 rows of {files[0]}, 4 rows of {files[1]}, 8 rows of {files[2]}",
        "columns of data.train that are not read, metadata for rewards: source",
    ]
    prompts = PromptData(tokenizer, files[:2], cache_dir=tmp_path)
    prompts.setup()
    group = prompts.group("train", 13)
    assert (group.text, group.index, group.metadata["source"]) == ("say b 1", 13, "b")
    with pytest.raises(IndexError):
        prompts.rows["train"].where(16)
    assert prompts.where("train", [13]) == f"data.train, {files[1]}, row 2"


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 8])
def test_a_mixture_is_the_same_on_any_number_of_ranks_and_after_a_resume(
    tokenizer: Any, files: list[str], tmp_path: Path, window: int | None
) -> None:
    def loader(rank: int = 0, ranks: int = 1) -> tuple[Any, Any]:
        data = DemonstrationData(
            tokenizer, files[:2], weights=[1, 1], batch_size=4, window=window, cache_dir=tmp_path, seed=7
        )
        data.trainer = stub_trainer(rank, ranks, max_steps=8)
        data.setup()
        return data.train_dataloader(), data

    def steps(batches: Any, data: Any, count: int) -> list[list[str]]:
        return [[data.rows["train"].where(g.index) for g in b.groups] for b in islice(iter(batches), count)]

    alone = steps(*loader(), 4)
    names = [place.split(", row")[0] for step in alone for place in step]
    assert Counter(names) == {files[0]: 8, files[1]: 8}
    shared = [steps(*loader(rank, 2), 4) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*shared, strict=True)] == [sorted(step) for step in alone]
    for taken in range(1, 4):
        batches, data = loader()
        assert steps(batches, data, taken) == alone[:taken]
        state = json.loads(json.dumps(batches.state_dict()))
        again, data = loader()
        again.load_state_dict(state)
        assert steps(again, data, 4 - taken) == alone[taken:]


def test_counts_are_logged(tokenizer: Any, files: list[str], tmp_path: Path) -> None:
    logged: dict[str, Any] = {}
    data = DemonstrationData(tokenizer, files[:2], weights=[3, 1], batch_size=4, cache_dir=tmp_path)
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.update(metrics))
    data.trainer = stub_trainer(loggers=[logger])
    data.setup()
    data.train_dataloader()
    assert logged == {f"data/{files[0]}": 12, f"data/{files[1]}": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "weights", "message"),
    [
        (2, [1], r"data\.weights has 1 numbers, data\.train has 2 sources"),
        (1, [1], r"data\.weights has 1 numbers, data\.train has 1 sources"),
        (2, [1, 0], "every weight is a number above 0"),
        (2, [1, -1], "every weight is a number above 0"),
        (2, ["a", 1], "every weight is a number above 0"),
        (2, [1, float("nan")], "every weight is a number above 0"),
        (2, "1,2", r"data\.weights=\['1,2'\]"),
    ],
)
def test_weights_that_are_no_proportions(
    tokenizer: Any, files: list[str], count: int, weights: Any, message: str
) -> None:
    data = DemonstrationData(tokenizer, files[:count] if count > 1 else files[0], weights=weights)
    with pytest.raises(UserError, match=message):
        data.setup()
    with pytest.raises(UserError, match=r"data\.train names .*a\.jsonl twice"):
        DemonstrationData(tokenizer, [files[0], files[0]]).setup()
