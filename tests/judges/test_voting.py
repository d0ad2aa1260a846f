"""Several judges and a vote, and the table that makes judges from settings."""

from __future__ import annotations

import pytest

from rlhf_lightning.data.comparisons import Comparison
from rlhf_lightning.errors import UserError
from rlhf_lightning.judges.language import LanguageJudge
from rlhf_lightning.judges.questions import Reply
from rlhf_lightning.judges.table import load_judge, models, with_models
from rlhf_lightning.judges.voting import Jury
from tests.judges.models import Fake, pair, says


def leaning(share: float, tokens: int = 10) -> LanguageJudge:
    """Return a judge that gives the text "x" this share, in both orders."""
    return LanguageJudge(
        Fake(
            lambda q, r: Reply(
                probabilities=(share, 1 - share) if r[0] == "x" else (1 - share, share), prompt_tokens=tokens
            )
        )
    )


def test_the_mean_and_the_majority() -> None:
    members = {"a": leaning(0.9), "b": leaning(0.4), "c": leaning(0.45)}
    ((_, mean),) = Jury(members).compare([pair("x", "y")])
    assert mean.probability == pytest.approx((0.9 + 0.4 + 0.45) / 3)
    assert mean.votes == {"a": pytest.approx(0.9), "b": pytest.approx(0.4), "c": pytest.approx(0.45)}
    ((_, most),) = Jury(members, vote="majority").compare([pair("x", "y")])
    assert most.probability == pytest.approx(1 / 3)
    assert sum(answer.prompt_tokens for answer in most.answers) == 60


def test_who_failed_has_no_vote() -> None:
    members = {"a": leaning(0.9), "b": LanguageJudge(Fake(says("blah")))}
    ((_, verdict),) = Jury(members).compare([pair("x", "y")])
    assert verdict.probability == pytest.approx(0.9)
    assert verdict.votes == {"a": pytest.approx(0.9), "b": None}
    ((_, verdict),) = Jury({"b": members["b"]}).compare([pair("x", "y")])
    assert verdict.probability is None
    assert {answer.failure for answer in verdict.answers} == {"no judge gave a verdict"}


def test_ratings_and_rankings() -> None:
    members = {
        "a": LanguageJudge(Fake(says("[[2]]")), method="generate"),
        "b": LanguageJudge(Fake(says("[[5]]")), method="generate"),
    }
    ((_, ratings),) = Jury(members).rate([pair("x", "y")])
    assert [rating.value for rating in ratings] == [3.5, 3.5]

    def alphabetical(question: object, responses: list[str]) -> Reply:
        letters = sorted("ABC"[: len(responses)], key=lambda letter: responses["ABC".index(letter)])
        return Reply(f"[[{' > '.join(letters)}]]")

    three = Comparison("c", [{"role": "user", "content": "Hi"}], ("y", "x", "z"))
    jury = Jury(
        {
            "a": LanguageJudge(Fake(alphabetical), method="generate"),
            "b": LanguageJudge(Fake(alphabetical), method="generate"),
        }
    )
    assert [ranking.ranks for _, ranking in jury.rank([three])] == [(1, 0, 2)]


def test_all_comparisons_come_back() -> None:
    pairs = [pair("x", "y", str(i)) for i in range(130)]
    assert [number for number, _ in Jury({"a": leaning(0.9)}).compare(pairs)] == list(range(130))


def test_settings_make_judges() -> None:
    jury = load_judge({"kind": "many", "vote": "mean", "members": {"a": {"kind": "world"}}, "mode": "of the stage"})
    assert isinstance(jury, Jury)
    assert jury.name == "jury"
    for settings, message in (
        ({}, "no judge is chosen: judge= one of local, server, world, many"),
        ({"kind": "servers"}, r"judge\.kind=servers is no judge: .*Did you mean 'server'"),
        ({"kind": "many", "members": {}}, "judge=many needs members"),
        ({"kind": "many", "members": {"a": {"kind": "x"}}}, r"judge\.members\.a\.kind=x is no judge"),
        ({"kind": "many", "vote": "most", "members": {"a": {"kind": "world"}}}, r"judge\.vote=most is not one of mean"),
        ({"kind": "local", "model": None}, r"judge=local needs judge\.model"),
        ({"kind": "server", "model": None, "base_url": "http://x/v1"}, r"judge=server needs judge\.model"),
    ):
        with pytest.raises(UserError, match=message):
            load_judge(settings)


def test_models_of_settings() -> None:
    settings = {"kind": "many", "members": {
        "a": {"kind": "local", "model": "runs/judge"}, "b": {"kind": "server", "model": "gpt"}, "c": {"kind": "world"},
    }}  # fmt: skip
    assert models(settings) == ["runs/judge"]
    resolved = with_models(settings, lambda name: f"/cache/{name}")
    assert resolved["members"]["a"] == {"kind": "local", "model": "/cache/runs/judge", "name": "judge"}
    assert resolved["members"]["b"] == settings["members"]["b"]
    assert settings["members"]["a"]["model"] == "runs/judge"
    assert models(None) == []
