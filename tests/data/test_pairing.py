"""Rows with one rated response: SFT takes what is good, preferences compare responses to equal prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import DemonstrationData, PreferenceData
from rlhf_lightning.data.layouts import Columns
from rlhf_lightning.data.pairing import paired
from rlhf_lightning.data.records import preference
from rlhf_lightning.data.sources import read_source
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_tokenizer
from tests.modules.offline import start

KTO = [
    {"prompt": "say red", "completion": "red", "label": True},
    {"prompt": "say blue", "completion": "blue", "label": True},
    {"prompt": "say red", "completion": "green", "label": False},
    {"prompt": "say red", "completion": "gold", "label": True},
    {"prompt": "say red", "completion": "teal", "label": False, "system": "Be kind."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(start(tmp_path_factory.mktemp("pairing")))


def rows_of(rows: list[dict[str, Any]], **columns: Any) -> list[tuple[str, Any]]:
    return list(paired(read_source(rows, "train"), Columns(columns)).rows())


def test_true_is_better_than_false_where_the_prompts_are_equal() -> None:
    found = dict(rows_of(KTO))
    ranking = preference(found["row 1 and row 3 and row 4"])
    assert (ranking.responses, ranking.ranks) == (["red", "gold", "green"], [0, 0, 1])  # two pairs
    assert found["row 2"] == KTO[1]
    assert found["row 5"] == KTO[4]  # another system message is another prompt
    assert len(found) == 3


def test_higher_ratings_are_better() -> None:
    rows = [{"prompt": "say", "response": text, "helpfulness": n} for text, n in (("a", 1), ("b", 4), ("c", 3))]
    ((_, row),) = rows_of(rows)
    assert (preference(row).responses, preference(row).ranks) == (["b", "c", "a"], [0, 1, 2])
    mine = [{"ask": "say", "say": text, "stars": n, "prompt": n} for text, n in (("a", 1), ("b", 4))]
    ((_, row),) = rows_of(mine, prompt="ask", response="say", rating="stars")
    assert preference(row, Columns({"prompt": "ask"})).responses == ["b", "a"]


def test_rows_that_have_pairs_stay_where_they_are() -> None:
    pair = {"prompt": "say", "chosen": "a", "rejected": "b"}
    assert rows_of([pair, KTO[0], pair]) == [("row 1", pair), ("row 3", pair), ("row 2", KTO[0])]


@pytest.mark.slow
def test_preferences_are_made_of_kto_rows_or_refused(tokenizer: Any, tmp_path: Path) -> None:
    data = PreferenceData(tokenizer, KTO, cache_dir=tmp_path)
    with pytest.raises(UserError, match="row 2: its response is rated True, and no row with the same prompt is rated"):
        data.setup()
    data = PreferenceData(tokenizer, KTO, cache_dir=tmp_path, on_bad_row="skip")
    data.setup()
    assert len(data.rows["train"]) == 1
    assert data.rows["train"][0].ranks == [0, 0, 1]
    assert sum(data.rows["train"].skipped.values()) == 2
    with pytest.raises(UserError, match=r"label is 1 beside a single response: data\.columns\.label=label"):
        PreferenceData(tokenizer, [row | {"label": int(row["label"])} for row in KTO], cache_dir=tmp_path).setup()
    both = [row | {"label": int(row["label"])} for row in (KTO[0], KTO[2])]
    data = PreferenceData(tokenizer, both, cache_dir=tmp_path, columns={"label": "label"})
    data.setup()
    assert tokenizer.decode(data.rows["train"][0].responses[0], skip_special_tokens=True) == "red"


def test_sft_learns_true_rows_and_counts_the_others(tokenizer: Any, tmp_path: Path) -> None:
    data = DemonstrationData(tokenizer, KTO, cache_dir=tmp_path)
    data.setup()
    assert len(data.rows["train"]) == 3
    assert data.rows["train"].skipped == {"it is labelled false: SFT learns only what is labelled true": 2}
    window = DemonstrationData(tokenizer, KTO, cache_dir=tmp_path, window=4, batch_size=2)
    window.setup()
    assert len(window.rows["train"]) == 3
    assert window.rows["train"].skipped == {"it is labelled false: SFT learns only what is labelled true": 1}


def test_rows_of_several_files_are_compared_within_each(tokenizer: Any, tmp_path: Path) -> None:
    files = []
    for name, rows in (("a", [KTO[0], KTO[2]]), ("b", [KTO[2], KTO[3]])):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceData(tokenizer, files, weights=[1, 2], batch_size=2, cache_dir=tmp_path)
    data.setup()
    assert [data.rows["train"].where(i) for i in range(2)] == [f"{file}, row 1 and row 2" for file in files]
