"""Critique and revision: what the teacher is asked, what becomes of its answers, and what goes wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from rlhf_lightning.data.messages import Message, turn
from rlhf_lightning.data.records import demonstration
from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.revision import NO_CRITIQUE, NO_REVISION, ChatTeacher, Revised, revise
from rlhf_lightning.feedback.world_teacher import WorldTeacher
from rlhf_lightning.judges.constitution import Constitution, load_constitution
from rlhf_lightning.world import gold, rows
from rlhf_lightning.world.prompts import Prompt, flawed

WORLD = load_constitution("world")


class Asked:
    """Answers with a text of how often it was asked, and remembers what it was asked."""

    def __init__(self, answers: Sequence[Any] = ()) -> None:
        self.answers, self.conversations, self.seeds = list(answers), list[Any](), list[Any]()

    def __call__(
        self, conversations: Sequence[Sequence[Message]], ids: Sequence[int], seed_parts: Sequence[int | str]
    ) -> list[Any]:
        self.conversations.append([list(messages) for messages in conversations])
        self.seeds.append((tuple(ids), tuple(seed_parts)))
        if self.answers:
            return [self.answers.pop(0) for _ in conversations]
        return [f" call {len(self.conversations)} for {number} " for number in ids]


def first(row: int = 7, text: str | None = "An answer.", **columns: Any) -> Revised:
    return Revised(
        row, {"id": f"r{row}", "prompt": "Hi?", **columns}, [turn("system", "Be kind."), turn("user", "Hi?")], text
    )


def contents(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def test_each_round_criticizes_the_last_revision_in_the_conversation() -> None:
    ask = Asked()
    (revised,) = revise([first()], ChatTeacher(ask, WORLD), WORLD, rounds=2, seed=5)
    principles = [WORLD.sample(5, 7, number) for number in range(2)]
    critique, revision, again, _ = [contents(conversations[0]) for conversations in ask.conversations]
    opening = [("system", "Be kind."), ("user", "Hi?")]
    request = f"{principles[0].critique} {WORLD.rules}"
    assert critique == [*opening, ("assistant", "An answer."), ("user", request)]
    assert revision == [*critique, ("assistant", "call 1 for 7"), ("user", principles[0].revise)]
    assert again[2] == ("assistant", "call 2 for 7")  # not the first answer
    assert [(s.principle, s.critique, s.revision) for s in revised.steps] == [
        (principles[0].name, "call 1 for 7", "call 2 for 7"),
        (principles[1].name, "call 3 for 7", "call 4 for 7"),
    ]
    assert (revised.first, revised.response, revised.failure) == ("An answer.", "call 4 for 7", None)
    assert len({seed for _, seed in ask.seeds}) == 4  # no two questions share their random numbers


def test_examples_come_between_the_system_message_and_the_prompt() -> None:
    constitution, ask = load_constitution("default"), Asked()
    revise([first()], ChatTeacher(ask, constitution, examples=2), constitution)
    asked = contents(ask.conversations[0][0])
    assert asked[0] == ("system", "Be kind.")
    assert [role for role, _ in asked[1:13]] == ["user", "assistant"] * 6
    example = constitution.examples[1]
    principle = constitution.with_name(example.principle)
    assert [text for _, text in asked[7:13]] == [
        example.prompt, example.response, f"{principle.critique} {constitution.rules}", example.critique,
        principle.revise, example.revision,
    ]  # fmt: skip
    assert asked[13] == ("user", "Hi?")
    with pytest.raises(UserError, match="revise.examples=4: the constitution has 3"):
        ChatTeacher(ask, constitution, examples=4)


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("It is rude.\n\nHuman: And now?\n\nAssistant: Yes.", "It is rude."),
        ("It is rude.\nUser: more", "It is rude."),
        ("The Human: a book.", "The Human: a book."),
        ("  spaces \n", "spaces"),
    ],
)
def test_the_next_turns_that_a_base_model_writes_are_cut(answer: str, kept: str) -> None:
    (revised,) = revise([first()], ChatTeacher(Asked([answer, "better"]), WORLD), WORLD)
    assert revised.steps[0].critique == kept


@pytest.mark.parametrize(
    ("answers", "failure"),
    [
        (["", "unused"], NO_CRITIQUE),
        (["\n\nHuman: what?", "unused"], NO_CRITIQUE),
        (["critique", ""], NO_REVISION),
        (["critique", "  \n"], NO_REVISION),
        ([UserError("no room for an answer"), "unused"], "no room for an answer"),
        (["critique", UserError("the server answered 500")], "the server answered 500"),
    ],
)
def test_a_round_that_fails_leaves_the_response_and_says_why(answers: list[Any], failure: str) -> None:
    (revised,) = revise([first()], ChatTeacher(Asked(answers), WORLD), WORLD)
    assert (revised.response, revised.failure, revised.steps[0].failure) == ("An answer.", failure, failure)
    assert revised.steps[0].revision is None
    assert revised.as_row()["failure"] == failure


def test_one_good_round_is_enough_and_one_bad_row_does_not_move_the_others() -> None:
    # critiques of rows 1, 2, 3 (2 is empty), then two revisions; then critiques of three, revisions of three
    script = ["c1", "", "c3", "r1", "r3", "c1", "c2", "c3", "", "second", "third"]
    revised = revise([first(1), first(2), first(3)], ChatTeacher(Asked(script), WORLD), WORLD, rounds=2)
    assert [answer.response for answer in revised] == ["r1", "second", "third"]
    assert [answer.failure for answer in revised] == [None, None, None]
    assert [[step.failure for step in answer.steps] for answer in revised] == [
        [None, NO_REVISION],
        [NO_CRITIQUE, None],
        [None, None],
    ]


def test_without_a_first_answer_nothing_is_asked() -> None:
    ask = Asked()
    without = Revised(0, {}, [turn("user", "Hi?")], None, problem="no room for an answer")
    (revised,) = revise([without], ChatTeacher(ask, WORLD), WORLD)
    assert not ask.conversations
    assert (revised.failure, revised.response, revised.steps) == ("no room for an answer", None, [])


def test_rows_are_demonstrations_of_the_last_revision_with_their_history() -> None:
    (revised,) = revise([first(label="safe", type="homonyms")], ChatTeacher(Asked(), WORLD), WORLD)
    row = revised.as_row()
    record = demonstration(row)
    assert contents(record.content) == [("system", "Be kind."), ("user", "Hi?"), ("assistant", "call 2 for 7")]
    assert row["first_answer"] == "An answer."
    assert row["revisions"] == [
        {"principle": WORLD.sample(0, 7, 0).name, "critique": "call 1 for 7", "revision": "call 2 for 7"}
    ]
    assert row["type"] == "homonyms"
    assert "label" not in row  # SFT would read it as one of the response


def test_rounds_are_at_least_one() -> None:
    with pytest.raises(UserError, match=r"revise\.rounds=0"):
        revise([first()], ChatTeacher(Asked(), WORLD), WORLD, rounds=0)


# ---- the scripted teacher --------------------------------------------------------------------------------------------


def answered(kind: str, count: int = 120) -> list[Revised]:
    """Return prompts of the world, each answered with a flaw."""
    found = []
    for number, row in enumerate(rows("prompts", count)):
        prompt = Prompt(
            row["family"], row["prompt"], row["ideal"], row["answer"], tuple(row["others"]), row["claim"], row["count"]
        )
        text = flawed(prompt, kind, random.Random(number))
        if text is not None:
            found.append(Revised(number, row, [turn("user", row["prompt"])], text))
    assert found
    return found


def only(*names: str, rules: bool = True) -> Constitution:
    return Constitution(tuple(WORLD.with_name(name) for name in names), WORLD.conflicts if rules else ())


@pytest.mark.parametrize(
    ("principle", "kind"),
    [
        ("harmless", "complying"),
        ("helpful", "refusing"),
        ("helpful", "short"),
        ("honest", "flattering"),
        ("concise", "padded"),
    ],
)
def test_a_principle_repairs_its_flaw(principle: str, kind: str) -> None:
    constitution = only(principle)
    for answer in revise(answered(kind), WorldTeacher(constitution), constitution):
        assert answer.response is not None
        assert gold(answer.columns, answer.response).total == 1.0, answer
        assert answer.response != answer.first


def test_a_principle_leaves_what_it_does_not_see() -> None:
    for principle, kind in (("harmless", "refusing"), ("concise", "wrong"), ("honest", "padded")):
        constitution = only(principle)
        for answer in revise(answered(kind), WorldTeacher(constitution), constitution):
            assert answer.response == answer.first


def test_an_honest_repair_keeps_the_padding() -> None:
    row = next(row for row in rows("prompts", 100) if row["family"] == "fact")
    answer = Revised(0, row, [turn("user", row["prompt"])], "It is Nowhere. That is a very good question.")
    (revised,) = revise([answer], WorldTeacher(only("honest")), only("honest"))
    assert revised.response == f"{row['ideal']} That is a very good question."


def test_what_is_still_too_long_without_filler_is_cut() -> None:
    row = next(row for row in rows("prompts", 100) if row["family"] == "fact")
    answer = Revised(0, row, [turn("user", row["prompt"])], row["ideal"] + " and on and on and on and on and on")
    (revised,) = revise([answer], WorldTeacher(only("concise")), only("concise"))
    assert gold(row, str(revised.response)).total == 1.0


def test_rules_for_conflicts_decide_what_is_done() -> None:
    lookalikes = [a for a in answered("padded") if a.columns["family"] == "lookalike"]
    harmless = only("harmless", rules=False)
    for answer in revise(lookalikes, WorldTeacher(harmless), harmless):
        assert gold(answer.columns, str(answer.response)).over_refused
    harmful = [
        Revised(a.row, a.columns, a.conversation, a.columns["ideal"])
        for a in answered("complying")
    ]  # fmt: skip
    helpful = only("helpful", rules=False)
    for answer in revise(harmful, WorldTeacher(helpful), helpful):
        assert gold(answer.columns, str(answer.response)).complied
    with_rules = only("helpful")
    for answer in revise(harmful, WorldTeacher(with_rules), with_rules):
        assert answer.response == answer.first


def test_it_overlooks_its_share_of_flaws() -> None:
    constitution, flaws = only("concise"), answered("padded", 300)
    left = revise(flaws, WorldTeacher(constitution, error_rate=0.3), constitution)
    assert left == revise(flaws, WorldTeacher(constitution, error_rate=0.3), constitution)
    share = sum(answer.response == answer.first for answer in left) / len(left)
    assert abs(share - 0.3) <= 3.5 * (0.21 / len(left)) ** 0.5


def test_other_prompts_and_principles_are_told_in_a_line() -> None:
    with pytest.raises(UserError, match=r"revise\.constitution: the built-in world has no principle 'no-serious-harm'"):
        WorldTeacher(load_constitution("default"))
    with pytest.raises(UserError, match=r"row 8 is no row of the built-in world \(it has no family"):
        revise([first()], WorldTeacher(WORLD), WORLD)
