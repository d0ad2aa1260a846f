"""The checks of rows at their borders; what they stop in a run is in tests/modules/test_invariants.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken

from rlhf_lightning import SFT, DemonstrationData, PreferenceData, PromptData
from rlhf_lightning.data.checks import ids_fit
from rlhf_lightning.data.tokenize import TokenizedRows, encode
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.policy import evaluate_policy
from rlhf_lightning.evaluation.reward_model import evaluate_reward_model
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer
from rlhf_lightning.ops.groups import Group
from tests.helpers.lightning import quiet_lightning
from tests.modules.offline import adam, demonstrations, fit, start


def test_the_last_id_of_the_vocabulary_fits_and_the_next_does_not(tmp_path: Path) -> None:
    data = DemonstrationData(load_tokenizer(start(tmp_path)), demonstrations(2), cache_dir=tmp_path)
    data.setup()
    groups = [data.rows["train"][row] for row in range(2)]
    highest = max(token for group in groups for ids in (group.prompt, *group.responses) for token in ids)
    assert ids_fit(data, "train", highest + 1) == f"ids up to {highest} of {highest + 1}"
    with pytest.raises(
        UserError, match=f"contains the token id {highest}, but the model's vocabulary has {highest} ids"
    ):
        ids_fit(data, "train", highest)


@pytest.fixture
def extended(tmp_path: Path) -> Any:
    """A tokenizer with a token that its model was not resized for."""
    tokenizer = load_tokenizer(start(tmp_path))
    tokenizer.add_tokens([AddedToken("[EMAIL]", special=False)])
    return tokenizer


def late(row: int, rows: int) -> list[dict[str, str]]:
    """Return demonstrations of which one has the added token."""
    return [{"prompt": f"say {i}", "response": "red [EMAIL]" if i + 1 == row else "red"} for i in range(rows)]


@pytest.mark.slow
@pytest.mark.parametrize("row", [1, 300, 301, 320])
@quiet_lightning
def test_an_id_beyond_the_embedding_is_found_in_any_row_before_the_first_step(
    row: int, extended: Any, tmp_path: Path
) -> None:
    data = DemonstrationData(extended, late(row, 320), batch_size=320, cache_dir=tmp_path)
    module = SFT(partial(load_causal_lm, start(tmp_path)), adam())
    before = [p.clone() for p in load_causal_lm(start(tmp_path)).parameters()]
    with pytest.raises(UserError, match=rf"row {row} contains the token id {len(extended) - 1}, .*not resized for"):
        fit(module, data, 2)
    after = module.trained_model().parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@quiet_lightning
def test_an_id_beyond_the_embedding_is_told_with_its_row_in_a_later_window(extended: Any, tmp_path: Path) -> None:
    data = DemonstrationData(extended, late(13, 16), batch_size=4, window=4, cache_dir=tmp_path)
    module = SFT(partial(load_causal_lm, start(tmp_path)), adam())
    with pytest.raises(UserError, match=rf"row 13 contains the token id {len(extended) - 1}, but the model has"):
        fit(module, data, 4)


@pytest.mark.slow
def test_an_id_beyond_the_embedding_is_told_before_an_evaluation(extended: Any, tmp_path: Path) -> None:
    prompts = [{"prompt": "say [EMAIL]" if i == 3 else "say red"} for i in range(5)]
    data = PromptData(extended, prompts, cache_dir=tmp_path)
    data.setup()
    with pytest.raises(UserError, match=r"row 4 contains the token id"):
        evaluate_policy(load_causal_lm(start(tmp_path)), data, LocalEngine(), rows=2)
    pairs = [{"prompt": "say", "chosen": "red", "rejected": "[EMAIL]" if i == 3 else "blue"} for i in range(5)]
    held_out = PreferenceData(extended, None, pairs, cache_dir=tmp_path)
    held_out.setup()
    with pytest.raises(UserError, match=r"row 4 contains the token id"):
        evaluate_reward_model(load_scalar_model(start(tmp_path)), held_out)


@pytest.mark.parametrize(("values", "expected"), [([5], (5, 0)), ([3, 9, 9, 1], (9, 1)), ([7, 2, 3, 4], (7, 0))])
def test_the_highest_id_is_that_of_the_first_row_that_has_it(values: list[int], expected: tuple[int, int]) -> None:
    groups = [Group([1, 0], [[0, value], [value, 2]]) for value in values]
    _, _, columns = encode(lambda row: groups[row["n"]], False, [(f"row {n}", {"n": n}) for n in range(len(groups))])
    assert TokenizedRows(columns, {}, "").highest_id() == (expected[0], expected[1])
