"""The data modules: what a step holds, and the mix-in of demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from rlhf_lightning import DemonstrationData, PreferenceData, PromptData
from rlhf_lightning.data.planning import MicroBatch
from rlhf_lightning.data.template import Template
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
    loader = data.train_dataloader()
    seen: list[int] = []
    for _ in range(2):  # two epochs of two steps
        for batch in loader:
            packed = batch.ptx.pack("padded")
            assert packed.padded
            assert packed.groups == 4
            seen += packed.index.tolist()
    assert sorted(seen) == list(range(16))  # every demonstration once
    assert data.ptx is not None
    assert data.ptx.template.name == "human_assistant"


def test_a_pair_that_differs_only_behind_the_cut_is_a_bad_row(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "say red", "chosen": "red green blue white", "rejected": "red green blue black"}]
    data = PreferenceData(tokenizer, rows, max_length=9, cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"row 1: the responses are identical within data\.max_length=9"):
        data.setup()


def test_a_step_smaller_than_its_microbatches_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    data = DemonstrationData(tokenizer, demonstrations(4), batch_size=2, cache_dir=tmp_path)
    data.trainer = Trainer(accumulate_grad_batches=3, accelerator="cpu", logger=False, enable_progress_bar=False)
    data.setup()
    with pytest.raises(UserError, match=r"data\.batch_size=2 rows cannot fill 3 microbatches per step"):
        data.train_dataloader()


def collated(data: Any) -> Any:
    """Return all training rows of a data module as one batch."""
    data.setup()
    return data.collate("train", MicroBatch(tuple(range(len(data.rows["train"]))), None, None, step=0)).pack()


@pytest.mark.parametrize("room", [2, 5, 99])
def test_the_response_is_learned_without_its_prompt_and_a_cut_one_does_not_end(
    tokenizer: Any, tmp_path: Path, room: int
) -> None:
    row = {"prompt": "say red", "response": "green blue white black amber"}
    template = Template(tokenizer)
    prompt, response = template.prompt([{"role": "user", "content": "say red"}]), template.response(row["response"])
    batch = collated(DemonstrationData(tokenizer, [row], max_length=len(prompt) + room, cache_dir=tmp_path))
    assert batch.targets.tolist() == response[:room]
    assert (batch.targets[-1] == tokenizer.eos_token_id) == (room > len(response))
    assert batch.input_ids[0].tolist() == prompt + response[:room]


def test_a_pair_keeps_its_beginnings_margin_and_label(tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompt": "say red", "chosen": "green blue white black", "rejected": "amber", "margin": 0.5, "label": 0.75}
    template = Template(tokenizer)
    room = 3
    length = len(template.prompt([{"role": "user", "content": "say red"}])) + room
    batch = collated(PreferenceData(tokenizer, [row], max_length=length, cache_dir=tmp_path))
    chosen, rejected = template.response(row["chosen"])[:room], template.response("amber")[:room]
    assert batch.targets.tolist() == chosen + rejected
    assert (batch.margins.tolist(), batch.labels.tolist(), batch.ranks.tolist()) == ([0.5], [0.75], [0, 1])


def test_a_ranking_keeps_its_ties(tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompt": "say red", "responses": ["red", "green", "blue"], "ranking": [2, 1, 2]}
    batch = collated(PreferenceData(tokenizer, [row], cache_dir=tmp_path))
    assert batch.ranks.tolist() == [0, 1, 1]
    first = batch.targets[batch.sequence_ids == 0].tolist()
    assert first == Template(tokenizer).response("green")


@pytest.mark.parametrize("turns", ["last", "all"])
@pytest.mark.parametrize(("weights", "learned"), [((0, 1), (1,)), ((1, 1), (0, 1)), ((None, 1), (0, 1))])
def test_messages_of_weight_0_are_not_learned_and_others_are(
    tokenizer: Any, tmp_path: Path, turns: str, weights: tuple[Any, ...], learned: tuple[int, ...]
) -> None:
    answers = [{"role": "assistant", "content": text} for text in ("red", "green blue")]
    flagged = [answer | {"weight": weight} for answer, weight in zip(answers, weights, strict=True)]
    ask, more = {"role": "user", "content": "say red"}, {"role": "user", "content": "say blue"}
    rows = [{"messages": [ask, flagged[0], more, flagged[1]]}]
    batch = collated(DemonstrationData(tokenizer, rows, turns=turns, cache_dir=tmp_path))
    template = Template(tokenizer)
    assert batch.targets.tolist() == [t for i in learned for t in template.response(answers[i]["content"])]


def test_rewards_get_what_the_row_has(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red"}], "source": "x"},
        {"prompt": "say red", "text": "the gold text", "chosen": "red", "rejected": "blue", "answer": 5},
        {"ask": "say red", "solution": "red"},
    ]
    data = PromptData(tokenizer, rows[:2], cache_dir=tmp_path)
    data.setup()
    turns = [{"role": "user", "content": "say red"}]
    assert data.group("train", 0).metadata == {"messages": turns, "completion": "red", "source": "x"}
    assert data.group("train", 1).metadata == rows[1] | {"messages": turns}
    data = PromptData(tokenizer, rows[2:], columns={"prompt": "ask", "answer": "solution"}, cache_dir=tmp_path)
    data.setup()
    assert data.group("train", 0).metadata == rows[2] | {"messages": turns, "answer": "red"}


def test_a_row_that_is_too_long_says_what_can_be_done(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "say red " * 9, "response": "red"}, {"prompt": "say red", "response": "red"}]
    message = r"row 1: the prompt leaves no room within data\.max_length=9; .*data\.max_length.*data\.on_bad_row=skip"
    with pytest.raises(UserError, match=message):
        DemonstrationData(tokenizer, rows, max_length=9, cache_dir=tmp_path).setup()
    data = DemonstrationData(tokenizer, rows, max_length=9, cache_dir=tmp_path, on_bad_row="skip")
    data.setup()
    assert data.rows["train"].skipped == {"the prompt leaves no room within data.max_length=9": 1}
