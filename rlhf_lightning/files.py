"""Atomic writes of files and folders, JSON, and content digests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import UserError


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of plain containers, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def regular(path: str | Path) -> Path:
    """Return the path of a regular file; reading a device, a pipe or a file of the kernel's may never end.

    Raises:
        UserError: it is something else, or a link to something else.
    """
    path = Path(path)
    kinds = {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    kinds[stat.S_IFDIR] = "a folder"
    try:
        kind = kinds.get(stat.S_IFMT(path.stat().st_mode))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if kind is None and path.resolve().is_relative_to("/proc"):
        kind = "a file of the kernel's"
    if kind is not None:
        real = f" (a link to {path.resolve()})" if path.is_symlink() else ""
        raise UserError(f"{path} is {kind}, not a file{real}")
    return path


def file_digest(*paths: Path) -> str:
    """Return the SHA-256 over the contents of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with regular(path).open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def readable_os_errors(path: str | Path) -> Iterator[None]:
    """Raise a full disk or a missing permission as a UserError; existing files stay as they were."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = write_failure(error)
        if reason is None:
            raise
        parent = next(p for p in [Path(path), *Path(path).parents] if p.exists())
        free = shutil.disk_usage(parent).free
        raise UserError(
            f"cannot write {path}: {reason} ({free / 2**20:.0f} MiB free); what was saved before is intact"
        ) from error


def write_failure(error: BaseException) -> str | None:
    """Return why the operating system refused to write, when a full disk or a missing permission is behind `error`."""
    number = _os_error(error)
    denied = isinstance(error, OSError) and number in (errno.EACCES, errno.EROFS)
    return os.strerror(number) if number is not None and (denied or number in (errno.ENOSPC, errno.EDQUOT)) else None


def _os_error(error: BaseException | None) -> int | None:
    """Return the operating system's error behind `error`: torch and safetensors wrap it in types of their own."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it is synced and renamed to `path`, else removed."""
    path = Path(path)
    with readable_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; on success it is synced and takes the name of `folder`, else removed.

    An older folder of that name is replaced only when the new one is complete.
    """
    folder = Path(folder)
    with readable_os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
        older = folder.with_name(f"{temporary.name}.old")
        try:
            yield temporary
            for file in temporary.iterdir():
                file.chmod(0o644)  # safetensors makes files only their owner can read
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            temporary.chmod(0o755)
            if folder.exists():
                folder.rename(older)  # faster than removing it: hardly a moment without a folder of this name
            os.replace(temporary, folder)
            _sync_folder(folder.parent)
            shutil.rmtree(older, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def build_once(folder: str | Path, build: Callable[[Path], Any]) -> None:
    """Fill `folder` with `build` unless it exists; of concurrent processes the first one wins."""
    folder = Path(folder)
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, suffix=".tmp"))
    try:
        build(temporary)
        os.replace(temporary, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=str, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object per line, atomically; control characters are escaped."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows), encoding="utf-8")


def read_json(path: str | Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None when there is no file.

    Raises:
        UserError: it is something else; files of others are as hostile as they like.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:  # no JSON, no text, nested too deeply, too long a number
        raise UserError(f"{path} is not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is not readable JSON (a {type(content).__name__}, not an object); remove it to continue"
        )
    return content


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
