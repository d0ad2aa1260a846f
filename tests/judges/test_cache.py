"""Replies on disk: asked once, whatever ended the run before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.judges.cache import CachedModel
from rlhf_lightning.judges.questions import Question, Reply
from tests.judges.models import Fake, by_length, says

QUESTIONS = [Question("a", ("A", "B")), Question("b"), Question("b", sample=1)]


def ask(model: CachedModel, questions: Sequence[Question] = QUESTIONS) -> list[Reply]:
    replies = dict(model.ask(questions))
    model.close()
    return [replies[i] for i in range(len(questions))]


def test_a_question_is_asked_once(tmp_path: Path) -> None:
    first = Fake(says("A"))
    fresh = ask(CachedModel(first, tmp_path))
    second = Fake(says("B"))
    stored = ask(CachedModel(second, tmp_path))
    assert len(first.asked) == 3
    assert second.asked == []
    assert [(r.text, r.prompt_tokens, r.completion_tokens) for r in stored] == [("A", 100, 2)] * 3
    assert [r.cached for r in fresh + stored] == [False] * 3 + [True] * 3
    assert first.closed


def test_probabilities_are_kept(tmp_path: Path) -> None:
    reply = Reply(probabilities=(0.1, 0.25), prompt_tokens=7, seconds=0.5)
    ask(CachedModel(Fake(lambda question, responses: reply), tmp_path), QUESTIONS[:1])
    (stored,) = ask(CachedModel(Fake(by_length), tmp_path), QUESTIONS[:1])
    assert (stored.probabilities, stored.prompt_tokens, stored.seconds) == ((0.1, 0.25), 7, 0.5)


def test_what_decides_a_reply_is_its_key(tmp_path: Path) -> None:
    ask(CachedModel(Fake(says("A")), tmp_path))
    for other in (Question("c"), Question("b", sample=2), Question("b", ("A",)), Question("a", ("B", "A"))):
        model = Fake(says("B"))
        ask(CachedModel(model, tmp_path), [other])
        assert model.asked == [other]
    other_model = Fake(says("B"), "another")
    ask(CachedModel(other_model, tmp_path))
    assert len(other_model.asked) == 3


def test_failures_are_asked_again(tmp_path: Path) -> None:
    failing = Fake(lambda question, responses: Reply(failure="no answer"))
    assert ask(CachedModel(failing, tmp_path))[0].failure == "no answer"
    assert [reply.text for reply in ask(CachedModel(Fake(says("A")), tmp_path))] == ["A"] * 3


def test_what_was_answered_before_an_error_is_kept(tmp_path: Path) -> None:
    class Breaks(Fake):
        def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
            yield 1, Reply("A")
            raise UserError("gone")

    with pytest.raises(UserError, match="gone"):
        ask(CachedModel(Breaks(says("A")), tmp_path))
    rest = Fake(says("B"))
    assert [reply.text for reply in ask(CachedModel(rest, tmp_path))] == ["B", "A", "B"]


@pytest.mark.slow
def test_a_killed_process_keeps_its_replies(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from rlhf_lightning.judges.cache import CachedModel\n"
        "from rlhf_lightning.judges.questions import Question\n"
        "from tests.judges.models import Fake, says\n"
        "replies = CachedModel(Fake(says('A')), sys.argv[1]).ask([Question(str(i)) for i in range(9)])\n"
        "next(replies), next(replies)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == -signal.SIGKILL
    rest = Fake(says("B"))
    ask(CachedModel(rest, tmp_path), [Question(str(i)) for i in range(9)])
    assert len(rest.asked) == 7


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "replies.db").write_text("this is no database, and long enough to be read as one " * 20)
    with pytest.raises(UserError, match=r"judge\.cache: .*replies\.db cannot be used .*delete it"):
        CachedModel(Fake(by_length), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"judge\.cache: .* cannot be used"):
        CachedModel(Fake(by_length), tmp_path / "file")
