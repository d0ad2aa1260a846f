"""`stage=label` without a browser, and `stage=chat`."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_lightning.data.messages import Message
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.runtime.instantiate import missing_extra
from rlhf_lightning.stages.chat import Conversation
from tests.helpers.cli import newest, rlhf
from tests.helpers.labeling import label_all, labeling_of, rows


class Count:
    """A model that says how many messages it has read, and what seeds it."""

    def close(self) -> None:
        pass

    def __call__(self, messages: Sequence[Message], num_generations: int, seed_parts: Sequence[int | str]) -> list[str]:
        if messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        return [f"\x1b[31m{len(messages)} messages, seed {seed_parts}\x1b[0m"] * num_generations


@pytest.fixture
def conversation() -> Conversation:
    """A conversation that prints into a text."""
    return Conversation(Count(), "be kind", seed=7, console=Console(file=io.StringIO(), width=200))


def printed(conversation: Conversation) -> str:
    return conversation.console.file.getvalue()


def test_a_conversation_in_the_terminal(conversation: Conversation, tmp_path: Path) -> None:
    assert conversation.take("hello")
    assert conversation.take("  ")
    assert conversation.take("more")
    assert "2 messages, seed (7, 'chat', 0)" in printed(conversation)
    assert "4 messages, seed (7, 'chat', 1)" in printed(conversation)
    assert "\x1b" not in printed(conversation)
    conversation.take("/undo")
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant"]
    conversation.take(f"/save {tmp_path / 'a.jsonl'}")
    conversation.take("/system be brief")
    assert conversation.messages == [{"role": "system", "content": "be brief"}]
    conversation.take("hi")
    conversation.take(f"/save {tmp_path / 'a.jsonl'}")
    saved = [json.loads(line)["messages"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [[m["content"] for m in one[:2]] for one in saved] == [["be kind", "hello"], ["be brief", "hi"]]
    conversation.take("/reset")
    assert conversation.messages == [{"role": "system", "content": "be brief"}]
    conversation.take("/system")
    assert conversation.messages == []
    conversation.take("/help")
    assert "/save <file>" in printed(conversation)
    assert not conversation.take("/quit")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/udno", "no command /udno.*Did you mean '/undo'?"),
        ("/undo", "nothing to undo"),
        ("/save x.jsonl", "no answer to save"),
        ("/save", "the name of a JSON lines file is needed"),
        ("/save /tmp", "the name of a JSON lines file is needed"),
    ],
)
def test_commands_that_cannot_be_carried_out(conversation: Conversation, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        conversation.take(line)


def test_an_interrupted_answer_takes_the_message_back(conversation: Conversation) -> None:
    conversation.take("hello")
    before = list(conversation.messages)
    assert conversation.take("stop")
    assert conversation.messages == before


def test_lines_of_a_pipe(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/wrong\ntwo\n"))
    conversation.run()
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["one", "two"]
    assert "there is no command /wrong" in printed(conversation)


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_the_missing_extra_is_named(package: str) -> None:
    error = ModuleNotFoundError(f"No module named '{package}'")
    assert missing_extra(error) == f"{package} is not installed: pip install 'rlhf-lightning[label]'"


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_chat_from_the_command(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "model", ["Hello."], vocab_size=270, hidden_size=16, layers=1, heads=2)
    done = rlhf(tmp_path, "stage=chat", f"init_from={folder}", "chat.max_new_tokens=4")  # no line on stdin
    assert done.stderr == ""
    assert "init_from=" in rlhf(tmp_path, "stage=chat", code=2).stderr
    assert "temperature" in rlhf(tmp_path, "stage=chat", f"init_from={folder}", "chat.temperature=-1", code=2).stderr


@pytest.mark.slow
def test_labels_are_written_again_and_withdrawn_by_the_command(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, rows(3), overlap=1.0)
    for name in ("anna", "ben"):
        label_all(labeling, name)
    labeling.store.close()
    database = f"label.database={tmp_path / 'labels.db'}"
    rlhf(tmp_path, "stage=label", "label.export=true", database)
    assert len((newest(tmp_path, "label") / "labels.jsonl").read_text().splitlines()) == 6
    done = rlhf(tmp_path, "stage=label", "label.withdraw=bem", database, code=2)
    assert "there is no annotator 'bem'" in done.stderr
    assert "Did you mean 'ben'?" in done.stderr
    rlhf(tmp_path, "stage=label", "label.withdraw=ben", database)
    run = newest(tmp_path, "label")
    assert len((run / "labels.jsonl").read_text().splitlines()) == 3
    assert "ben" not in "".join(file.read_text() for file in run.glob("*.jsonl"))
    assert json.loads((run / "metrics.json").read_text()) == {
        "monitor": None,
        "labels": 3,
        "preferences": 3,
        "notes": 0,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "label.mode=compare needs rows to label: data.train=<file>"),
        (["label.mode=chat", "label.base_url=http://127.0.0.1:9/v1"], "needs label.model"),
        (["label.export=true", "label.database=no.db"], "there is no database of labels no.db"),
        (["data.train=rows.jsonl", "label.database=rows.jsonl"], "rows.jsonl is not an SQLite database"),
        (["data.train=rows.jsonl", "label.mode=edit", "label.checks=rows.jsonl"], "label.checks has check questions for label.mode=compare and rank"),
        (["data.train=rows.jsonl", "label.pairs=0"], "label.pairs=0"),
        (["data.train=rows.jsonl", "label.annotators=3.5"], "label.annotators=3.5 is neither a number"),
        (["data.train=rows.jsonl", "label.warn=nsfw"], "label.warn=nsfw: no row of rows.jsonl has the column nsfw"),
        (["data.train=rows.jsonl", "label.groups=3"], "label.groups=3 is not a list of texts"),
        (["data.train=rows.jsonl", "label.checks=no.jsonl"], "label.checks: there is no file no.jsonl"),
        (["data.train=rows.jsonl", "label.instructions=no.md"], "label.instructions: no.md cannot be read"),
        (["label.export=true"], "label.export=true needs label.database=<file>"),
        (["label.mode=chat"], "label.mode=chat needs a model: init_from=<model>, or label.base_url"),
        (["data.train=rows.jsonl", "label.port=0"], "label.port=0"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(3)))
    done = rlhf(tmp_path, "stage=label", *arguments, code=2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "rows.jsonl").read_text().startswith('{"id"')
