"""Replies on disk, by the content of the question and of what answers it: an interrupted run asks nothing twice."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import UserError
from rlhf_lightning.files import fingerprint
from rlhf_lightning.judges.questions import Model, Question, Reply

FILE = "replies.db"
TABLE = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT"


def cached(model: Model, folder: str | Path | None) -> Model:
    """Return a model whose replies are kept in a folder; itself where there is none."""
    return model if folder is None else CachedModel(model, folder)


class CachedModel:
    """Answers from disk what was answered before. A failure is no answer, and is asked again.

    A reply is on disk before it is returned, so a process that is killed loses those that were on their way. Several
    processes may share the folder.

    Args:
        model: answers what is not there.
        folder: is created.

    Raises:
        UserError: the file there is damaged or no such database.
    """

    def __init__(self, model: Model, folder: str | Path) -> None:
        self.model, self.name, self.identity = model, model.name, model.identity
        self.path = Path(folder).expanduser() / FILE
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            self.database.execute("PRAGMA journal_mode = WAL")
            self.database.execute("PRAGMA synchronous = NORMAL")
            self.database.execute(TABLE)
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> UserError:
        return UserError(f"judge.cache: {self.path} cannot be used ({error}); delete it, or give another folder")

    def to(self, device: Any) -> CachedModel:
        """Move the model and return self."""
        if hasattr(self.model, "to"):
            self.model.to(device)  # type: ignore[attr-defined]
        return self

    def close(self) -> None:
        """Close the file and the model."""
        self.database.close()
        self.model.close()

    def key(self, question: Question) -> str:
        """Return what a reply is found by: everything that decides it."""
        return fingerprint([self.identity, dataclasses.asdict(question)])

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Yield the replies, those on disk first; see :meth:`Model.ask`."""
        missing = []
        for place, question in enumerate(questions):
            reply = self._read(question)
            if reply is None:
                missing.append(place)
            else:
                yield place, reply
        for number, reply in self.model.ask([questions[place] for place in missing]):
            if reply.failure is None:
                self._write(questions[missing[number]], reply)
            yield missing[number], reply

    def _read(self, question: Question) -> Reply | None:
        try:
            row = self.database.execute("SELECT value FROM replies WHERE key = ?", [self.key(question)]).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        if row is None:
            return None
        text, probabilities, prompt_tokens, completion_tokens, seconds = json.loads(row[0])
        shares = None if probabilities is None else tuple(probabilities)
        return Reply(text, shares, None, prompt_tokens, completion_tokens, seconds, cached=True)

    def _write(self, question: Question, reply: Reply) -> None:
        value = [reply.text, reply.probabilities, reply.prompt_tokens, reply.completion_tokens, reply.seconds]
        try:
            self.database.execute(
                "INSERT OR REPLACE INTO replies VALUES (?, ?)", [self.key(question), json.dumps(value)]
            )
        except sqlite3.Error as error:
            raise self._unusable(error) from error
