"""The checks of rows at their borders; what they stop in a run is in tests/modules/test_invariants.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_lightning import DemonstrationData
from rlhf_lightning.data.checks import ids_fit
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_tokenizer
from tests.modules.offline import demonstrations, start


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
