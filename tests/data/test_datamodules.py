"""The data modules: what a step holds, and the mix-in of demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import DemonstrationData, PreferenceData, PromptData
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_tokenizer
from tests.modules.offline import demonstrations, start


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(start(tmp_path_factory.mktemp("data")))


def test_the_mix_in_has_the_template_and_layout_of_the_prompts_and_goes_on_over_epochs(
    tokenizer: Any, tmp_path: Path
) -> None:
    rows = demonstrations(16)
    data = PromptData(
        tokenizer, rows[:4], ptx=rows, ptx_batch_size=4, batch_size=2, template="human_assistant", cache_dir=tmp_path
    )
    data.setup()
    data.layout = "padded"
    loader = data.train_dataloader()
    seen: list[int] = []
    for _ in range(2):  # two epochs of two steps
        for batch in loader:
            assert batch.ptx.padded
            assert batch.ptx.groups == 4
            seen += batch.ptx.index.tolist()
    assert sorted(seen) == list(range(16))  # every demonstration once
    assert data.ptx is not None
    assert data.ptx.template.name == "human_assistant"


def test_a_pair_that_differs_only_behind_the_cut_is_a_bad_row(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "say red", "chosen": "red green blue white", "rejected": "red green blue black"}]
    data = PreferenceData(tokenizer, rows, max_length=9, cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"row 1: the responses are identical within data\.max_length=9"):
        data.setup()


def test_a_step_smaller_than_its_microbatches_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    data = DemonstrationData(tokenizer, demonstrations(4), batch_size=2, accumulate=3, cache_dir=tmp_path)
    data.setup()
    with pytest.raises(UserError, match=r"data\.batch_size=2 rows cannot fill 3 microbatches a step"):
        data.train_dataloader()
