"""Atomic writes of files and folders, JSON, and content digests."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
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
    """Return why the operating system refused to write, when a disk or a missing permission is behind `error`."""
    number = _os_error(error)
    denied = isinstance(error, OSError) and number in (errno.EACCES, errno.EPERM, errno.EROFS)
    broken = number in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    return os.strerror(number) if number is not None and (denied or broken) else None


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


def remove_temporaries(folder: Path, pattern: str = ".*.*") -> None:
    """Remove what killed processes left in `folder`: the temporary files and folders of this module.

    Args:
        pattern: of their names, without the ending.
    """
    for ending in (".tmp", ".tmp.old"):
        for path in folder.glob(pattern + ending):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


_LOCKS: dict[tuple[int, Path], int] = {}  # by process: a fork has none; closing a file would end its lock


def lock(path: Path, wait: bool = False) -> str | None:
    """Lock the file `path` until this process ends; return what has it locked when it is not this process.

    The lock ends with the process, however it ends, and is not inherited by children. On a file system without locks
    nothing is locked.
    """
    path = path.resolve()
    if (os.getpid(), path) in _LOCKS:
        return None
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        holder = os.read(handle, 200).decode(errors="replace").strip()
        os.close(handle)
        return holder or "another process" if error.errno in (errno.EACCES, errno.EAGAIN) else None
    if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
        os.close(handle)  # removed by the process that this one has waited for
        return lock(path, wait)
    os.truncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _LOCKS[os.getpid(), path] = handle
    return None


def unlock(path: Path) -> None:
    """End the lock of `path` that this process has, and remove the file."""
    path.unlink(missing_ok=True)
    if (handle := _LOCKS.pop((os.getpid(), path.resolve()), None)) is not None:
        os.close(handle)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of `path`, a file that is there only as long."""
    lock(path, wait=True)
    try:
        yield
    finally:
        unlock(path)


def build_once(folder: str | Path, build: Callable[[Path], Any]) -> None:
    """Fill `folder` with `build` unless it exists; concurrent processes wait for the first one."""
    folder = Path(folder)
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return
        remove_temporaries(folder.parent, f".{folder.name}.*")
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
        try:
            build(temporary)
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, on a file system without locks
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
