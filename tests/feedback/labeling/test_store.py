"""The store: nothing confirmed is lost, nothing is changed or removed, and another file is refused with one line."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.labeling.store import Store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed store with two items and three events."""
    store = Store(tmp_path / "labels.db", {"mode": "compare", "seed": 0})
    store.add_items({"a": {"id": "a"}, "b": {"id": "b"}})
    for request in ("r1", "r2", "r3"):
        store.add("label", "anna", "a", request, value=1)
    store.close()
    return store.path


def test_events_are_read_again_as_they_were_written(path: Path) -> None:
    store = Store(path)
    assert [(e.number, e.kind, e.annotator, e.item, e.request, e.value) for e in store.events] == [
        (n, "label", "anna", "a", f"r{n}", {"value": 1}) for n in (1, 2, 3)
    ]
    assert store.items == {"a": {"id": "a"}, "b": {"id": "b"}}
    assert store.settings == {"mode": "compare", "seed": 0}
    store.close()


def test_a_repeated_request_adds_nothing(path: Path) -> None:
    store = Store(path)
    event, new = store.add("label", "anna", "a", "r2", value=3)
    assert (event.number, event.value, new) == (2, {"value": 1}, False)
    assert len(store.events) == 3
    store.close()


def test_items_that_are_there_stay_as_they_are(path: Path) -> None:
    store = Store(path)
    store.add_items({"a": {"id": "other"}, "c": {"id": "c"}})
    store.close()
    store = Store(path)
    assert store.items == {"a": {"id": "a"}, "b": {"id": "b"}, "c": {"id": "c"}}
    store.close()


@pytest.mark.parametrize(
    "statement",
    ["UPDATE events SET value = '{}'", "DELETE FROM events", "DELETE FROM items", "UPDATE items SET value = ''"],
)
def test_history_cannot_be_changed(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="only added"):
        connection.execute(statement)
    connection.close()


def test_the_database_syncs_every_commit(tmp_path: Path) -> None:
    store = Store(tmp_path / "labels.db")
    assert store._pragma("journal_mode") == "wal"
    assert store._pragma("synchronous") == 2  # FULL
    store.close()


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:4296] = b"\xff" * 200
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:10_000])


def no_database(path: Path) -> None:
    path.write_text("id,label\n" * 1000)


def of_something_else(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (x)")
    connection.commit()
    connection.close()


def newer(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()


def with_a_gap(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("DROP TRIGGER events_are_kept")
    connection.execute("DELETE FROM events WHERE number = 2")
    connection.commit()
    connection.close()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged, "damaged, or was not copied whole"),
        (cut, "damaged, or was not copied whole"),
        (no_database, "is not an SQLite database"),
        (of_something_else, "SQLite database of something else"),
        (newer, "of version 2; this program reads version 1"),
        (with_a_gap, "event 2 is missing"),
        (a_folder, "is a folder, not a file"),
    ],
)
def test_another_file_is_refused_and_stays(path: Path, spoil: object, message: str) -> None:
    spoil(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(UserError, match=message) as caught:
        Store(path)
    assert "\n" not in str(caught.value)
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_other_settings_are_refused(path: Path) -> None:
    with pytest.raises(UserError, match="was started with mode=compare, not rank"):
        Store(path, {"mode": "rank"})
    with pytest.raises(UserError, match="there is no database of labels"):
        Store(path.with_name("other.db"), create=False)


def test_a_store_is_one_process_s(path: Path) -> None:
    store = Store(path)
    program = f"from rlhf_lightning.feedback.labeling.store import Store; Store({str(path)!r})"
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            exec(program)
        except UserError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert f"is in use by process {os.getpid()}" in os.read(reader, 1000).decode()
    os.close(reader)
    os.close(writer)
    store.close()
    Store(path).close()  # nobody has it any more


def test_a_copy_without_its_wal_is_whole_or_refused(tmp_path: Path) -> None:
    """A copy made while the store is open, without the -wal file, never has labels that were not made."""
    store = Store(tmp_path / "labels.db")
    store.add("label", "anna", None, "r1", value=1)
    shutil.copy(store.path, tmp_path / "copy.db")
    store.close()
    copy = Store(tmp_path / "copy.db")
    assert copy.events == []
    copy.close()


@pytest.mark.slow
def test_a_confirmed_event_survives_sigkill(tmp_path: Path) -> None:
    program = (
        "from rlhf_lightning.feedback.labeling.store import Store\n"
        f"store = Store({str(tmp_path / 'labels.db')!r})\n"
        "for i in range(10**6):\n"
        "    event, _ = store.add('label', 'anna', None, f'r{i}', value=i)\n"
        "    print(event.number, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    confirmed = 0
    assert process.stdout is not None
    for line in process.stdout:
        confirmed = int(line)
        if confirmed == 100:
            process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    store = Store(tmp_path / "labels.db")
    assert confirmed <= len(store.events) <= confirmed + 1  # the last one may not have been printed
    assert [event.value["value"] for event in store.events] == list(range(len(store.events)))
    store.close()


def test_a_new_database_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    with contextlib.closing(Store(tmp_path / "labels.db", {"mode": "compare"})) as store:
        store.add("skip", "anna", "x", reason="y")
        assert {file.stat().st_mode & 0o077 for file in tmp_path.glob("labels.db*") if file.suffix != ".lock"} == {0}
