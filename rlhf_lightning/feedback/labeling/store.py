"""The store of labels: an SQLite database to which events are added, and from which nothing is removed."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import UserError
from rlhf_lightning.files import lock, regular, unlock

APPLICATION = 0x726C6866  # "rlhf"
VERSION = 1
"""Of the tables below; a store of another version is refused."""
TABLES = f"""
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE items (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE events (
    number INTEGER PRIMARY KEY,
    time TEXT NOT NULL,
    kind TEXT NOT NULL,
    annotator TEXT NOT NULL,
    item TEXT,
    request TEXT UNIQUE,
    value TEXT NOT NULL
) STRICT;
CREATE TRIGGER events_stay BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are only added'); END;
CREATE TRIGGER events_are_kept BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are only added'); END;
CREATE TRIGGER items_stay BEFORE UPDATE ON items BEGIN SELECT RAISE(ABORT, 'items are only added'); END;
CREATE TRIGGER items_are_kept BEFORE DELETE ON items BEGIN SELECT RAISE(ABORT, 'items are only added'); END;
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
"""


@dataclass(frozen=True)
class Event:
    """A row of the history.

    Args:
        number: counts from 1 in the order of the events.
        time: ISO 8601 in UTC.
        kind: label, skip, flag, undo, withdraw, group, turn (of a conversation), new (conversation), or refused.
        annotator: who did it.
        item: the key of the item that it is about.
        request: names the request that caused it, so that a repeated request adds no second event.
        value: what else there is to know, by kind.
    """

    number: int
    time: str
    kind: str
    annotator: str
    item: str | None = None
    request: str | None = None
    value: dict[str, Any] = field(default_factory=dict)


class Store:
    """Items and the history of what annotators did with them, in one SQLite file (WAL, synchronous=FULL).

    An event is on disk when :meth:`add` returns. A process has a store for itself; its threads share it.

    Args:
        path: of the database; it is created where it does not exist, unless `create` is false.
        settings: what decides the meaning of its labels; a store that was started with others is refused.

    Raises:
        UserError: no database, one of something else, of another version or damaged; it is in use by another process,
            or was started with other settings.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any] | None = None, create: bool = True) -> None:
        self.path = Path(path).expanduser()
        self._mutex, self._lock = threading.RLock(), self.path.with_name(f"{self.path.name}.lock")
        if not self.path.exists() and not create:
            raise UserError(f"there is no database of labels {self.path}")
        if self.path.exists():
            regular(self.path)
        with self._readable():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if holder := lock(self._lock):
                raise UserError(f"{self.path} is in use by {holder}; stop it first, or give another label.database")
            try:
                self.path.touch(mode=0o600)  # what annotators say is for whoever runs it
                self._connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
                self._open()
                self._agree(dict(settings or {}))
                self.events = list(self._read_events())
                self.items: dict[str, dict[str, Any]] = {
                    key: json.loads(value) for key, value in self._connection.execute("SELECT key, value FROM items")
                }
            except BaseException:
                self._end()
                raise
        self._requests = {event.request: event for event in self.events if event.request}

    def close(self) -> None:
        """Write everything into the one file and close it."""
        with self._mutex, self._readable():
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._end()

    def _end(self) -> None:
        if connection := getattr(self, "_connection", None):
            connection.close()
        unlock(self._lock)

    def add_items(self, items: Mapping[str, dict[str, Any]]) -> None:
        """Add items by key; those that are there already stay as they are."""
        new = {key: value for key, value in items.items() if key not in self.items}
        with self._mutex, self._readable(), self._transaction():
            rows = [(key, json.dumps(value)) for key, value in new.items()]
            self._connection.executemany("INSERT INTO items VALUES (?, ?)", rows)
        self.items |= new

    def add(
        self,
        kind: str,
        annotator: str,
        item: str | None = None,
        request: str | None = None,
        **value: Any,
    ) -> tuple[Event, bool]:
        """Add an event and return it when it is on disk, and whether it is new: of a repeated request it is the first.

        Raises:
            UserError: the disk is full or lost; the event is not in the store.
        """
        with self._mutex:
            if request and request in self._requests:
                return self._requests[request], False
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            event = Event(len(self.events) + 1, time, kind, annotator, item, request, value)
            row = (event.number, time, kind, annotator, item, request, json.dumps(value))
            with self._readable(), self._transaction():
                self._connection.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            self.events.append(event)
            if request:
                self._requests[request] = event
            return event, True

    def request(self, request: str | None) -> Event | None:
        """Return the event that a request has caused already."""
        return self._requests.get(request) if request else None

    # ---- opening ---------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Create the tables of a new database; raise a UserError for one that cannot be used."""
        application, version = (self._pragma(name) for name in ("application_id", "user_version"))
        tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not tables and not application:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.executescript(f"BEGIN; {TABLES} COMMIT;")
        elif application != APPLICATION:
            raise UserError(f"{self.path} is an SQLite database of something else, not of labels")
        elif version != VERSION:
            raise UserError(
                f"{self.path} is a database of labels of version {version}; this program reads version {VERSION}"
            )
        elif (found := self._pragma("quick_check")) != "ok":
            raise UserError(self._damaged(str(found)))
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")

    def _agree(self, settings: dict[str, Any]) -> None:
        """Record the settings of a new store; raise a UserError where a store has others."""
        rows = self._connection.execute("SELECT name, value FROM settings")
        recorded = {name: json.loads(value) for name, value in rows}
        for name, value in settings.items():
            if name in recorded and recorded[name] != value:
                raise UserError(
                    f"{self.path} was started with {name}={recorded[name]}, not {value}; give that, or another "
                    "label.database"
                )
        with self._transaction():
            for name in settings.keys() - recorded.keys():
                self._connection.execute("INSERT INTO settings VALUES (?, ?)", (name, json.dumps(settings[name])))
        self.settings = recorded | settings

    def _read_events(self) -> Iterator[Event]:
        for number, (*row, value) in enumerate(self._connection.execute("SELECT * FROM events ORDER BY number"), 1):
            if row[0] != number:
                raise UserError(self._damaged(f"event {number} is missing"))
            yield Event(*row, value=json.loads(value))

    def _pragma(self, name: str) -> Any:
        return self._connection.execute(f"PRAGMA {name}").fetchone()[0]

    def _damaged(self, reason: str) -> str:
        return (
            f"{self.path} is damaged, or was not copied whole ({reason}); copy it while nothing has it open, with the "
            f"file {self.path.name}-wal beside it where there is one"
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Raise what SQLite and the disk say as a UserError."""
        try:
            yield
        except (sqlite3.Error, ValueError) as error:
            if "not a database" in str(error):
                raise UserError(f"{self.path} is not an SQLite database") from error
            if isinstance(error, ValueError) or "malformed" in str(error):
                raise UserError(self._damaged(" ".join(str(error).split()))) from error
            raise UserError(f"{self.path} cannot be read or written: {error}; what was saved is intact") from error
        except OSError as error:
            raise UserError(f"{self.path} cannot be opened: {error.strerror or error}") from error
