"""Rewards from folders, functions and checkers; mistakes end in one readable line."""

from __future__ import annotations

import asyncio
import math
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken, AutoModelForSequenceClassification

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_scalar_model, load_tokenizer
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.rewards.checkers import exact_answer
from rlhf_lightning.rewards.folder import FolderReward
from rlhf_lightning.rewards.scoring import load_reward, score

SOURCE = """
def length(prompts, responses, metadata):
    return [float(len(r)) for r in responses]

def doubled(prompts, responses, metadata):
    return [2.0 * len(r) for r in responses]

NUMBER = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A user's module in the working directory."""
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield "my_rewards"
    sys.modules.pop("my_rewards", None)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward model with a random head and stored statistics."""
    root = tmp_path_factory.mktemp("reward")
    start = build_tiny(root / "lm", ["hello there, general"] * 20, vocab_size=280, hidden_size=32, layers=2, heads=2)
    model = load_scalar_model(start)
    model.config.reward_mean, model.config.reward_std = 0.25, 2.0
    model.save_pretrained(root / "rm")
    load_tokenizer(start).save_pretrained(root / "rm")
    return str(root / "rm")


# ---- functions -----------------------------------------------------------------------------------------------------


def test_function_from_the_working_directory(module: str) -> None:
    reward = load_reward(f"{module}:length")
    assert score(reward, ["a", "b"], ["xx", "yyy"], [{}, {}]).tolist() == [2.0, 3.0]


def test_list_is_the_mean(module: str) -> None:
    reward = load_reward([f"{module}:length", f"{module}:doubled"])
    assert score(reward, ["a"], ["xx"], [{}]).tolist() == [3.0]


def test_callable_passes_through() -> None:
    assert load_reward(exact_answer) is exact_answer


def test_world_is_the_gold_reward() -> None:
    from rlhf_lightning.world import gold_reward

    assert load_reward("world") is gold_reward


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module_here:f", "the module no_such_module_here cannot be imported"),
        ("my_rewards:lenght", "my_rewards has no lenght. Did you mean 'length'?"),
        ("my_rewards:NUMBER", "NUMBER is int, not a function"),
        ("my_rewards", "neither a reward model folder"),
        ("runs/typo", "neither a reward model folder"),
        (":length", "neither a reward model folder"),
        ("my_rewards:", "neither a reward model folder"),
    ],
)
def test_mistakes_in_the_name(spec: str, message: str, module: str) -> None:
    with pytest.raises(UserError) as caught:
        load_reward(spec)
    assert message in str(caught.value)
    assert spec in str(caught.value)


# ---- what a reward returns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], r"shape \(1,\) for 2 responses"),
        ([[1.0], [2.0]], r"shape \(2, 1\) for 2 responses"),
        (3.0, r"shape \(\) for 2 responses"),
        ([1.0, float("nan")], "the reward is nan for the response 'second' to 'q2'"),
        ([float("-inf"), 0.0], "the reward is -inf for the response 'first' to 'q1'"),
        ([1.0, None], "the reward is None for the response 'second' to 'q2'; every response needs a finite number"),
        (("x", 2.0, None), "the reward is None for response 3 of 2"),
        (["good", "bad"], "2 responses"),
        (None, "2 responses"),
    ],
)
def test_what_is_no_number_is_refused(returned: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(lambda *_: returned, ["q1", "q2"], ["first", "second"], [{}, {}])


def trl(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    return [len(text) + n for text, n in zip(completions, kwargs["n"], strict=True)]


def trl_with_a_column(completions: list[str], n: list[float], **kwargs: Any) -> list[float]:
    return [len(text) + x for text, x in zip(completions, n, strict=True)]


def trl_without_others(prompts: list[str], completions: list[str], n: list[float]) -> list[float]:
    return [len(text) + x for text, x in zip(completions, n, strict=True)]


def keywords(prompts: list[str], responses: list[str], **kwargs: Any) -> list[float]:
    return [len(text) + n for text, n in zip(responses, kwargs["n"], strict=True)]


def only_keywords(*, responses: list[str], metadata: list[dict[str, float]]) -> list[float]:
    return [len(text) + row["n"] for text, row in zip(responses, metadata, strict=True)]


def any_positional(*args: Any) -> list[float]:
    return [len(text) + row["n"] for text, row in zip(args[1], args[2], strict=True)]


class Judge:
    async def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return trl(prompts, completions, **kwargs)


STYLES = [trl, trl_with_a_column, trl_without_others, keywords, only_keywords, any_positional, Judge(), partial(trl)]


@pytest.mark.parametrize("reward", STYLES, ids=lambda reward: getattr(reward, "__name__", type(reward).__name__))
def test_rewards_are_called_as_their_parameters_ask(reward: Any) -> None:
    rows = [{"n": 0.5}, {"n": 10.0, "other": "x"}]
    for kind in (reward, load_reward([reward, reward])):
        assert score(kind, ["q1", "q2"], ["a", "bb"], rows).tolist() == [1.5, 12.0]


def test_a_row_without_a_column_has_none_there() -> None:
    seen: list[Any] = []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        seen.append(kwargs)
        return [0.0] * len(completions)

    score(reward, ["q1", "q2"], ["a", "b"], [{"x": 1}, {"y": 2}])
    assert seen == [{"prompts": ["q1", "q2"], "x": [1, None], "y": [None, 2]}]


def test_an_async_reward_inside_a_running_loop() -> None:
    async def notebook() -> list[float]:
        return score(Judge(), ["q"], ["abc"], [{"n": 1.0}]).tolist()

    assert asyncio.run(notebook()) == [4.0]


def test_a_member_that_fails_is_told() -> None:
    with pytest.raises(UserError, match="the reward is nan for the response 'b' to 'q2'"):
        score(
            load_reward([exact_answer, lambda *_: [0.0, float("nan")]]), ["q1", "q2"], ["a", "b"], [{"answer": 1}] * 2
        )


def test_integers_and_tensors_with_a_graph_are_accepted() -> None:
    assert score(lambda *_: [1, 0], ["q"] * 2, ["a"] * 2, [{}] * 2).tolist() == [1.0, 0.0]
    graph = torch.ones(2, dtype=torch.float64, requires_grad=True) * 2
    found = score(lambda *_: graph, ["q"] * 2, ["a"] * 2, [{}] * 2)
    assert found.dtype == torch.float32
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("16 - 3 = 13.\n#### 13", "13", 1.0),
        ("The answer is 1,000.", "1000", 1.0),
        ("It costs $1,000.50", "1,000.50", 1.0),
        ("13, no: 12", "13", 0.0),
        ("minus -4", "-4", 1.0),
        ("no number", "4", 0.0),
        ("4", 4, 1.0),
        ("", "4", 0.0),
    ],
)
def test_exact_answer(response: str, answer: object, expected: float) -> None:
    assert exact_answer(["q"], [response], [{"answer": answer}]) == [expected]


def test_exact_answer_reads_the_last_number_of_a_rationale() -> None:
    rationale = {"answer": "48 / 2 = <<48/2=24>>24 clips in May.\n#### 1,072"}
    assert exact_answer(["q"] * 2, ["It is 1072.0", "It is 24"], [rationale] * 2) == [1.0, 0.0]
    with pytest.raises(UserError, match=r"needs a number in the column answer of every row; 'How many\?' has none"):
        exact_answer(["How many?"], ["3"], [{}])


def test_an_ensemble_is_the_mean_of_its_members() -> None:
    def one(prompts: list[str], responses: list[str], metadata: list[dict[str, object]]) -> list[float]:
        return [1.0 for _ in responses]

    found = load_reward([one, exact_answer]).to("cpu")(["q", "q"], ["3", "4"], [{"answer": "3"}] * 2)
    assert found.tolist() == [1.0, 0.5]


# ---- reward model folders ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_folder_scores_are_those_of_hugging_face(reward_folder: str) -> None:
    reward = load_reward(reward_folder)
    assert isinstance(reward, FolderReward)
    prompts = ["hello", "there", "hello", "a much longer question, general"]
    responses = ["general", "hello there", "", "x" * 30]
    found = reward(prompts, responses, [{}] * 4)
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()
    tokenizer = load_tokenizer(reward_folder)
    for prompt, response, value in zip(prompts, responses, found.tolist(), strict=True):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        with torch.no_grad():
            raw = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item()
        assert value == pytest.approx((raw - 0.25) / 2.0, abs=1e-5)


def test_folder_scores_do_not_depend_on_company(reward_folder: str) -> None:
    reward = FolderReward(reward_folder, batch_tokens=40)
    prompts, responses = ["hello", "there", "hello", "hello"], ["a", "bb", "ccc", "a"]
    together = reward(prompts, responses, [{}] * 4)
    apart = torch.cat([reward([p], [r], [{}]) for p, r in zip(prompts, responses, strict=True)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    assert together[0] == pytest.approx(together[3].item(), abs=1e-5)


def test_folder_reads_the_whole_conversation(reward_folder: str) -> None:
    reward = FolderReward(reward_folder)
    turns = [
        {"role": "user", "content": "there"},
        {"role": "assistant", "content": "general"},
        {"role": "user", "content": "hello"},
    ]
    found = reward(["hello", "hello"], ["a", "a"], [{"messages": turns}, {}])
    assert abs((found[0] - found[1]).item()) > 1e-4


def test_folder_cuts_a_response_at_the_context(reward_folder: str) -> None:
    assert torch.isfinite(FolderReward(reward_folder)(["hello"], ["x y z " * 600], [{}])).all()


@pytest.mark.slow
def test_a_folder_without_a_chat_template_is_refused(reward_folder: str, tmp_path: Path) -> None:
    """Prompt and response one after the other would be scores of a text that no reward model has learned."""
    folder = shutil.copytree(reward_folder, tmp_path / "rm")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"the reward model .*rm has no chat template.* chat_template.jinja"):
        FolderReward(str(folder))
    (folder / "chat_template.jinja").write_text(template)
    asked = (["hello"], ["there"], [{}])
    assert FolderReward(str(folder))(*asked).tolist() == FolderReward(reward_folder)(*asked).tolist()


@pytest.mark.slow
def test_a_token_that_the_reward_model_was_not_resized_for_is_told(reward_folder: str, tmp_path: Path) -> None:
    folder = shutil.copytree(reward_folder, tmp_path / "rm")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens([AddedToken("[EMAIL]", special=False)])
    tokenizer.save_pretrained(folder)
    reward = FolderReward(str(folder))
    assert (
        reward(["hello"], ["there"], [{}]).tolist() == FolderReward(reward_folder)(["hello"], ["there"], [{}]).tolist()
    )
    with pytest.raises(UserError, match=r"has (\d+) ids, and its tokenizer gives the id \1 in a response to 'hello'"):
        score(reward, ["hello"], ["[EMAIL] there"], [{}])


def test_folder_without_a_reward_model(tmp_path: Path) -> None:
    start = build_tiny(tmp_path / "lm", ["hello"] * 5, vocab_size=270, hidden_size=16, layers=1, heads=1)
    with pytest.raises(UserError, match="is not a reward model folder"):
        load_reward(start)


def test_none_is_no_score_of_a_list_where_the_user_says_so() -> None:
    """The mean of those that give one, and an error where none does."""

    def length(prompts: Any, responses: Any, metadata: Any) -> list[float | None]:
        return [float(len(text)) if text != "b" else None for text in responses]

    def ten(prompts: Any, responses: Any, metadata: Any) -> list[float | None]:
        return [10.0 if text in "bcc" else None for text in responses]

    reward = load_reward([length, ten], none="skip")
    assert score(reward, [""] * 3, ["a", "b", "cc"], [{}] * 3).tolist() == [1.0, 10.0, 6.0]
    with pytest.raises(UserError, match=r"the reward is None for the response 'b'.*reward_none=skip"):
        score(load_reward([length, ten]), [""] * 2, ["a", "b"], [{}] * 2)
    with pytest.raises(UserError, match="no reward of 2 has a score for the response 'b' to 'q2'"):
        score(load_reward([length, length], none="skip"), ["q1", "q2"], ["a", "b"], [{}] * 2)
    with pytest.raises(UserError, match=r"the reward is nan for the response 'a'"):
        score(load_reward([lambda *_: [math.nan], ten], none="skip"), [""], ["a"], [{}])
    with pytest.raises(UserError, match=r"reward_none='sikp' is not one of error, skip\. Did you mean"):
        load_reward([length], none="sikp")
    with pytest.raises(UserError, match="reward_none=skip is for a list of rewards"):
        load_reward("world", none="skip")
