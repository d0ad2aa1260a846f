"""What a stage leaves behind: model folders with a manifest, JSON files, content hashes; every write is atomic."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import UserError

MANIFEST = "manifest.json"


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of plain containers, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def hash_weights(folder: str | Path) -> str | None:
    """Return the SHA-256 over the safetensors and config files of a model folder; None for a hub name."""
    path = Path(folder)
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), *path.glob("config.json")]):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def readable_os_errors(path: str | Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into a message; what was there before stays as it was."""
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
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return int(found[1])
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


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=str, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically; control characters are escaped."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows), encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file, or None when there is none."""
    path = Path(path)
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); remove it to go on") from error


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """Return the manifest of a model folder, or None when it has none."""
    return read_json(Path(folder) / MANIFEST)


def versions() -> dict[str, str]:
    """Return the versions that decide a result."""
    found = {"python": platform.python_version()}
    for name in ("rlhf-lightning", "torch", "lightning", "transformers", "tokenizers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def write_model(folder: str | Path, model: Any, tokenizer: Any, manifest: dict[str, Any]) -> None:
    """Save a Hugging Face model, its tokenizer and `manifest` as `folder`, all or nothing.

    An older folder of that name is replaced only when the new one is complete.
    """
    folder = Path(folder)
    with readable_os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
        try:
            model.save_pretrained(temporary, safe_serialization=True)
            tokenizer.save_pretrained(temporary)
            complete = manifest | {
                "weights": hash_weights(temporary),
                "versions": versions(),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            (temporary / MANIFEST).write_text(json.dumps(complete, indent=2, default=str) + "\n", encoding="utf-8")
            for file in temporary.iterdir():
                file.chmod(0o644)  # safetensors makes files only their owner can read
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            temporary.chmod(0o755)
            older = folder.with_name(f"{temporary.name}.old")
            if folder.exists():
                folder.rename(older)  # quick, unlike removing it: hardly a moment without a model of this name
            os.replace(temporary, folder)
            _sync_folder(folder.parent)
            shutil.rmtree(older, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def parent_entry(role: str, folder: str) -> dict[str, Any]:
    """Return a manifest's record of a model this stage started from."""
    local = Path(folder).is_dir()
    manifest = read_manifest(folder) if local else None
    weights = manifest.get("weights") if manifest else hash_weights(folder)
    return {"role": role, "folder": str(Path(folder).resolve()) if local else str(folder), "weights": weights}


def code_key(spec: Any) -> str | None:
    """Return a digest of the file of a reward `module:function`, found like an import but not imported; else None.

    What that file imports does not count.
    """
    module, _, name = str(spec).partition(":")
    found, path = None, [str(Path.cwd()), *sys.path]
    for part in module.split(".") if name else []:
        found = PathFinder.find_spec(part, path)
        path = list(found.submodule_search_locations or []) if found else []
    if found is None or not found.origin or not Path(found.origin).is_file():
        return None
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()


def find_run(run: Path, stage: str, resume: str | None, digest: str) -> tuple[Path, Path | None, dict[str, Any] | None]:
    """Return the run folder, the checkpoint to resume from, and the metrics when the run is already finished.

    With resume=here it is this folder, with resume=auto this one or the newest sibling of the same configuration.
    """
    mine = {"fingerprint": digest, "stage": stage}
    started = read_json(run / "run.json")
    if resume is None:
        claim(run, mine)
        return run, None, None
    if resume not in ("auto", "here"):
        path = Path(resume)
        path = path if path.suffix == ".ckpt" else path / "checkpoints" / "last.ckpt"
        if not path.is_file():
            raise UserError(f"resume={resume}: there is no checkpoint {path}; use resume=auto or a run folder")
        other = (read_json(path.parents[1] / "run.json") or {}).get("stage", stage)
        if other != stage:
            raise UserError(f"resume={resume} is a run of stage={other}, not of stage={stage}")
        claim(run, mine)
        return run, path, None
    if started and started.get("fingerprint") != digest:
        raise UserError(
            f"{run} was started with another configuration or other models; choose another folder to start anew"
        )
    siblings = sorted((p for p in run.parent.iterdir() if p != run), reverse=True) if resume == "auto" else []
    for folder in [run, *siblings]:
        found = read_json(folder / "run.json") if folder.is_dir() else None
        if not isinstance(found, dict) or found.get("fingerprint") != digest:
            continue
        if folder != run and not started:
            remove_start(run)
        checkpoint = folder / "checkpoints" / "last.ckpt"
        done = (folder / "model" / MANIFEST).is_file() or stage in ("evaluate", "candidates")
        metrics = read_json(folder / "metrics.json") if done else None
        return folder, checkpoint if checkpoint.is_file() else None, metrics
    claim(run, mine)
    return run, None, None


def claim(run: Path, value: dict[str, Any]) -> None:
    """Write `run.json`, or refuse when another start was there first."""
    with readable_os_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=run, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            json.dump(value, opened)
        try:
            os.link(name, run / "run.json")  # fails when it exists, whoever is quicker
        except FileExistsError:
            raise UserError(
                f"{run} already holds a run; add resume=auto to continue it, or choose another folder"
            ) from None
        finally:
            os.unlink(name)


def remove_start(run: Path) -> None:
    """Remove what Hydra wrote for a start that continues another run, and the folder when nothing else is in it."""
    shutil.rmtree(run / ".hydra", ignore_errors=True)
    for file in run.glob("run*.log"):
        file.unlink(missing_ok=True)
    if run.is_dir() and not any(run.iterdir()):
        run.rmdir()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
