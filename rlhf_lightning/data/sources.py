"""Where rows come from: files, folders, the hub, lists, and the built-in world. Rows are read lazily, one at a time."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.files import file_digest, read_json, regular

Row = dict[str, Any]
FORMATS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")


@dataclass(frozen=True)
class Source:
    """Rows that can be read repeatedly: a name for messages, a content key for caches, and the reader.

    `rows()` yields (where, row); `where` is the 1-based row number, with the file name when there are several files.
    `count()` is about the number of rows, None where it is unknown.
    """

    name: str
    key: str
    rows: Callable[[], Iterator[tuple[str, Row]]]
    count: Callable[[], int | None]


def read_source(
    source: Any,
    split: str,
    limit: int | None = None,
    kind: str = "prompts",
    world: Row | None = None,
    name: str | None = None,
    stream: bool = False,
) -> Source:
    """Return the rows of `source`.

    Args:
        source: a path, a folder, a hub data set name, a list of dicts, "world", or a Source, which is returned.
        split: "train" or "val"; selects the split of a hub data set, a folder or the world.
        limit: read only the first rows.
        kind: what the built-in world should make: demonstrations, preferences or prompts.
        world: options of the built-in world.
        name: the key of the configuration it comes from, for messages; `split` when None.
        stream: read nothing before the rows are asked for: a file's content key is its name, size and time, and a hub
            data set is not downloaded.

    Raises:
        UserError: when the source does not exist or is empty.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, list):
        key = _digest(json.dumps(source, sort_keys=True, default=str).encode())
        return _limited(Source(f"data.{name or split}", key, lambda: _numbered(source), lambda: len(source)), limit)
    if source == "world":
        return _world(kind, split, limit, dict(world or {}))
    path = Path(str(source)).expanduser()
    if path.is_dir():
        return _limited(_folder(path, split, stream), limit)
    if path.exists():
        return _limited(_file(path, stream), limit)
    if str(source).endswith(FORMATS) or str(source).startswith((".", "/", "~")):
        where = path.parent if path.parent.is_dir() else Path(".")
        hint = nearest(path.name, (p.name for p in where.iterdir()))
        raise UserError(f"data.{name or split}: there is no file {path}.{hint}")
    return _limited(_hub(str(source), split, stream), limit)


def _limited(source: Source, limit: int | None) -> Source:
    if limit is None:
        return source
    key = _digest(f"{source.key}:{limit}".encode())
    rows, count = (lambda: itertools.islice(source.rows(), limit)), (lambda: min(limit, source.count() or limit))
    return Source(source.name, key, rows, count)


def _numbered(rows: Any) -> Iterator[tuple[str, Row]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file(path: Path, stream: bool) -> Source:
    regular(path)
    if not str(path).endswith(FORMATS):
        raise UserError(f"{path}: unknown format; use one of {', '.join(FORMATS)}")
    key = (
        _digest(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}".encode())
        if stream
        else file_digest(path)
    )
    return Source(str(path), key, lambda: _numbered(_read(path)), lambda: _count(path))


def _read(path: Path) -> Iterator[Row]:
    name = str(path)
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        except pa.ArrowException as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
        return
    with _opened(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as text:
        try:
            if ".csv" in path.name:
                csv.field_size_limit(2**31 - 1)
                yield from csv.DictReader(text)
            elif ".jsonl" in path.name:
                yield from _json_lines(path, text)
            else:
                content = json.load(text)
                rows = content.get("data", [content]) if isinstance(content, dict) else content
                if not isinstance(rows, list):
                    raise UserError(f"{path} holds {type(rows).__name__}, not a list of rows")
                yield from rows
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, json.JSONDecodeError, csv.Error) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error


def _opened(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _count(path: Path) -> int | None:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.ParquetFile(path).metadata.num_rows
        if ".csv" not in path.name and ".jsonl" not in path.name:
            return sum(1 for _ in _read(path))
        with _opened(path) as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except Exception:  # reading the rows will say what is wrong with the file
        return None


def _json_lines(path: Path, text: io.TextIOWrapper) -> Iterator[Row]:
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, row {number}: not JSON ({error.msg} at column {error.colno})") from error


def _folder(path: Path, split: str, stream: bool) -> Source:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        import datasets

        _check_saved(path)
        try:
            dataset = datasets.load_from_disk(str(path))
        except Exception as error:  # whatever Arrow and datasets raise at damaged files
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{path} is no readable data set of save_to_disk: {reason}") from error
        if isinstance(dataset, datasets.DatasetDict):
            dataset = _pick(dataset, split, str(path))
        return Source(str(path), _content(dataset, split), lambda: _numbered(dataset), lambda: len(dataset))
    files = sorted(p for p in path.rglob("*") if str(p).endswith(FORMATS) and not p.is_dir())
    names = {"train": ("train",), "val": ("val", "valid", "eval", "test")}
    selected = [p for p in files if p.name.startswith(names[split])]
    if not selected and split == "train":  # files without a split in their name are for training
        selected = [p for p in files if not p.name.startswith(names["val"])]
    if not selected:
        kinds = f"{', '.join(FORMATS)} file for {split}"
        contents = f"; it contains {', '.join(p.name for p in files[:5])}" if files else ""
        raise UserError(f"data.{split}: the folder {path} contains no {kinds}{contents}")
    parts = [_file(p, stream) for p in selected]

    def rows() -> Iterator[tuple[str, Row]]:
        for part in parts:
            for where, row in part.rows():
                yield f"{Path(part.name).name}, {where}", row

    key = _digest("".join(part.key for part in parts).encode())
    return Source(str(path), key, rows, lambda: sum(part.count() or 0 for part in parts))


def _check_saved(path: Path) -> None:
    """Raise a UserError when a data set of save_to_disk names files that are not beside its state."""
    for state in path.rglob("state.json"):
        files = (read_json(state) or {}).get("_data_files")
        for file in files if isinstance(files, list) else ():
            name = str(file.get("filename") if isinstance(file, dict) else file)
            if Path(name).name != name:
                raise UserError(f"{state} names {name!r}, which is no file beside it")
            regular(state.parent / name)


def _pick(splits: Any, split: str, name: str) -> Any:
    for candidate in {"train": ["train"], "val": ["validation", "val", "valid", "eval", "test"]}.get(split, [split]):
        if candidate in splits:
            return splits[candidate]
    raise UserError(f"data.{split}: {name} has the splits {', '.join(splits)}, none of them for {split}")


def _content(dataset: Any, split: str) -> str:
    """Return the key of a `datasets.Dataset`: split, size, and the content of its Arrow files."""
    content = file_digest(*(Path(file["filename"]) for file in dataset.cache_files))
    return _digest(f"{split}:{dataset.num_rows}:{content}".encode())


def _hub(name: str, split: str, stream: bool) -> Source:
    import datasets

    @contextmanager
    def readable() -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # datasets raises a dozen types for "not reachable" and "not there"
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UserError(
                f"data.{split}={name} is no local file or folder, and could not be loaded from the hub: {reason}"
            ) from error

    def streamed() -> Iterator[tuple[str, Row]]:
        with readable():
            yield from _numbered(dataset)

    with readable():
        dataset = _pick(datasets.load_dataset(name, streaming=stream), split, name)
    if stream:
        return Source(name, _digest(f"{name}:{split}".encode()), streamed, lambda: None)
    return Source(name, _content(dataset, split), lambda: _numbered(dataset), lambda: len(dataset))


def _world(kind: str, split: str, limit: int | None, options: Row) -> Source:
    from rlhf_lightning import world

    sizes = {"train": options.pop("rows", 4096), "val": options.pop("val_rows", 512)}
    kind = options.pop("records", None) or kind
    seed = options.pop("seed", 0)
    size = limit or sizes[split]
    key = json.dumps([world.VERSION, kind, split, size, seed, options], sort_keys=True)
    return Source(
        f"the built-in world ({kind})",
        _digest(key.encode()),
        lambda: _numbered(world.rows(kind, size, seed=seed, split=split, **options)),
        lambda: size,
    )


def texts_of(value: Any) -> Iterator[str]:
    """Yield every text inside a row, without lone surrogates; a row with one is refused later, with its number."""
    if isinstance(value, str):
        yield value.encode(errors="ignore").decode()
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_of(inner)
