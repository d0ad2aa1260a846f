"""A judge as a reward: `reward_from=judge:<judge>`."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.judges.language import LanguageJudge
from rlhf_lightning.judges.questions import Question, Reply
from rlhf_lightning.rewards.judged import JudgeReward
from rlhf_lightning.rewards.scoring import load_reward, score
from rlhf_lightning.rewards.spec import digests, judges, parse
from tests.judges.models import Fake, by_length, says


def by_number(question: Question, responses: list[str]) -> Reply:
    """Rate a response by the number in it; one without a number gets none."""
    found = re.search(r"\d", responses[0])
    return Reply(f"[[{found[0]}]]" if found else "blah")


def written(answer: Any, **options: Any) -> LanguageJudge:
    return LanguageJudge(Fake(answer), method="generate", **options)


def test_each_response_gets_its_own_rating() -> None:
    """Also where responses to several prompts are mixed; a conversation is shown whole."""
    judge = written(by_number)
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Tell me"},
    ]
    prompts = ["one", "Tell me", "one", "Tell me", "one"]
    metadata: list[dict[str, Any]] = [{"messages": talk} if prompt == "Tell me" else {} for prompt in prompts]
    assert score(JudgeReward(judge), prompts, ["5", "4", "3", "2", "5"], metadata).tolist() == [5, 4, 3, 2, 5]
    assert sum("Assistant: Yes?" in question.text for question in judge.model.asked) == 2


def test_a_failed_rating() -> None:
    answers = (["p"] * 3, ["4", "none", "2"], [{}] * 3)
    with pytest.raises(UserError, match=r"the reward is None for the response 'none'"):
        score(JudgeReward(written(by_number)), *answers)
    assert score(JudgeReward(written(by_number), fill=True), *answers).tolist() == [4, 3, 2]
    with pytest.raises(UserError, match=r"judge\.on_failure=skip"):
        score(JudgeReward(written(by_number, on_failure="error")), *answers)
    with pytest.raises(UserError, match="the reward is None"):
        score(JudgeReward(written(says("blah")), fill=True), *answers)
    both = load_reward([JudgeReward(written(by_number)), lambda p, r, m: [0.0] * len(r)], none="skip")
    assert score(both, *answers).tolist() == [2, 0, 1]


def test_pairs_are_compared_in_both_orders() -> None:
    judge = LanguageJudge(Fake(by_length))
    found = JudgeReward(judge).compare(["p", "q", "p"], [("aaa", "b"), ("a", "bbb"), ("same", "same")], [{}, {}, {}])
    assert found.tolist() == pytest.approx([0.75, 0.25, 0.5])
    assert found.dtype == torch.float32
    assert len(judge.model.asked) == 4
    failed = JudgeReward(LanguageJudge(Fake(says("blah")))).compare(["p"], [("a", "b")], [{}])
    assert failed.tolist() == [0.5]


def test_the_name_is_reserved() -> None:
    assert [(reward.kind, reward.is_model) for reward in parse(["judge:server", "my.judge:f"])] == [
        ("judge", False),
        ("function", False),
    ]
    assert judges(["judge:local", "world", "judge:server"]) == ["local", "server"]
    assert digests("judge:local") != digests("judge:server")
    with pytest.raises(
        UserError, match=r"reward_from=judge:server: the settings of the judge are missing; choose judge=server"
    ):
        load_reward("judge:server")


def test_settings_make_the_reward() -> None:
    reward = load_reward("judge:world", settings={"judge": {"kind": "world", "seed": 0}})
    assert isinstance(reward, JudgeReward)
    assert reward.fill is False
    filled = load_reward("judge:world", none="skip", settings={"judge": {"kind": "world", "seed": 0}})
    assert filled.fill is True
    with pytest.raises(UserError, match="reward_none=skip is for a list of rewards"):
        load_reward("world", none="skip")
