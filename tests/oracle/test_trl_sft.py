"""SFT: loss, gradient norm and ten optimizer steps equal TRL's SFTTrainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import SFT, DemonstrationData
from rlhf_lightning.models.loading import load_causal_lm
from tests.helpers.lightning import quiet_lightning
from tests.oracle.side_by_side import (
    BATCH,
    Curve,
    arguments,
    assert_same,
    demonstrations,
    dialogues,
    in_our_order,
    optimizer,
    our_tokens,
    start,
    tokenizer,
    train_ours,
    train_theirs,
)

trl = pytest.importorskip("trl", reason="TRL is absent: pip install 'rlhf-lightning[oracle]'")
pytestmark = pytest.mark.oracle


# the header of a turn is not learned, its text and its end are
MARKED = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def both(
    folder: Path,
    rows: list[dict[str, Any]],
    batch: int = BATCH,
    accumulate: int = 1,
    turns: str = "last",
    template: str | None = None,
    **options: Any,
) -> tuple[Curve, Curve]:
    """Return our curve and TRL's over the same rows, after comparing the tokens and what is learned of them."""
    reader = tokenizer(folder)
    reader.chat_template = template or reader.chat_template
    data = DemonstrationData(reader, rows, batch_size=batch, cache_dir=folder, turns=turns, row_tokens=64)
    dataset = in_our_order(data, rows)
    theirs = trl.SFTTrainer(
        load_causal_lm(start(folder)),
        arguments(trl.SFTConfig, folder, **options),
        train_dataset=dataset,
        processing_class=reader,
    )
    learned = theirs.train_dataset
    if "seq_lengths" in learned.column_names:
        assert len(learned) < len(rows)  # packed
    else:
        for group, row in zip(our_tokens(data), learned, strict=True):
            (response,), (counted,) = group.responses, group.loss_mask
            assert [*group.prompt, *response] == row["input_ids"]
            labels = [token if counts else -100 for token, counts in zip(response, counted, strict=True)]
            assert labels == row["labels"][len(group.prompt) :]
    ours = SFT(partial(load_causal_lm, start(folder)), optimizer())
    return train_ours(ours, data, accumulate), train_theirs(theirs)


@quiet_lightning
def test_prompt_and_completion(tmp_path: Path) -> None:
    assert_same(*both(tmp_path, demonstrations()))


@quiet_lightning
def test_gradient_accumulation(tmp_path: Path) -> None:
    """Both divide by the tokens of the whole step, so the loss does not depend on how its rows are split."""
    options = {"per_device_train_batch_size": BATCH // 2, "gradient_accumulation_steps": 2}
    assert_same(*both(tmp_path, demonstrations(), accumulate=2, **options))


@quiet_lightning
def test_all_turns(tmp_path: Path) -> None:
    """`data.turns=all` is TRL's assistant_only_loss."""
    rows = dialogues()
    assert_same(*both(tmp_path, rows, turns="all", template=MARKED, assistant_only_loss=True))


@quiet_lightning
def test_raw_text(tmp_path: Path) -> None:
    """We put BOS before a raw text and learn its first token; TRL leaves BOS to the text, which is given it here."""
    rows = [{"text": row["response"]} for row in demonstrations()]
    assert_same(*both(tmp_path, rows))


@quiet_lightning
def test_padding_free(tmp_path: Path) -> None:
    """TRL's flattened batch keeps rows apart by their position ids, ours by a mask."""
    assert_same(*both(tmp_path, demonstrations(), padding_free=True, max_length=None))


@quiet_lightning
def test_packing(tmp_path: Path) -> None:
    """All rows are one step, because TRL packs the data set and so reorders it."""
    rows = demonstrations(12)
    options = {"packing": True, "max_length": 64, "per_device_train_batch_size": 12}
    assert_same(*both(tmp_path, rows, batch=12, **options))
