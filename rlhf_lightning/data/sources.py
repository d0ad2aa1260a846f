"""Where rows come from: files, folders, the hub, lists, and the built-in world. Rows are read lazily, one at a time."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_lightning.data.formats import FORMATS, count_rows, read_file
from rlhf_lightning.data.messages import RowError
from rlhf_lightning.data.mixture import check_weights, interleaved
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.files import file_digest, read_json, regular

Row = dict[str, Any]
SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "eval", "test")}
"""A split of ours -> what a split, or the begin of a file's name, is called for it."""
PATTERN = "*?["
PART = re.compile(r"(.+)\[(\d*):(\d*)\]")
WORLD = "the built-in world"


@dataclass(frozen=True)
class Source:
    """Rows that can be read repeatedly: a name for messages, a content key for caches, and the reader.

    `rows()` yields (where, row); `where` is the 1-based row number, with the file name when there are several files.
    In place of a row there may be the `RowError` that says why a line is none. `count()` is about the number of rows,
    None where it is unknown. A list of sources has them as `parts`, of which it mixes rows in proportion to `weights`.
    """

    name: str
    key: str
    rows: Callable[[], Iterator[tuple[str, Row]]]
    count: Callable[[], int | None]
    parts: tuple[Source, ...] = ()
    weights: tuple[float, ...] = ()


def read_source(
    source: Any,
    split: str,
    limit: int | None = None,
    kind: str = "prompts",
    world: Row | None = None,
    name: str | None = None,
    stream: bool = False,
    weights: Sequence[float] | None = None,
) -> Source:
    """Return the rows of `source`.

    Args:
        source: a path, a pattern of paths, a folder, a hub data set name, with `:split` or `:configuration:split`
            where it has several, and with `[start:stop]` at the end for a part of its rows, as in `datasets`; a list of
            these; a list of dicts; "world"; or a Source, which is returned.
        split: "train" or "val"; selects the split of a hub data set, a folder or the world.
        limit: read only the first rows, of each of several sources.
        kind: what the built-in world should make: demonstrations, preferences or prompts.
        world: options of the built-in world.
        name: the key of the configuration it comes from, without `data.`, for messages; `split` when None.
        stream: read nothing before the rows are asked for: a file's content key is its name, size and time, and a hub
            data set is not downloaded.
        weights: proportions in which the rows of several sources are drawn.

    Raises:
        UserError: when the source does not exist or is empty.
    """
    if isinstance(source, Source):
        return source
    key = name if name and "." in name else f"data.{name or split}"
    if isinstance(source, list | tuple) and source and all(isinstance(part, str | Path | Source) for part in source):
        parts = [read_source(part, split, limit, kind, world, name, stream) for part in source]
        return several(parts, key, check_weights(weights, len(parts), key), stream)
    check_weights(weights, 1, key)
    if isinstance(source, list | tuple):
        rows, digest = list(source), _digest(json.dumps(source, sort_keys=True, default=str).encode())
        return _limited(Source(key, digest, lambda: _numbered(rows), lambda: len(rows)), limit)
    if source == "world":
        return _world(kind, split, limit, dict(world or {}))
    place, start, stop = _part(str(source), key)
    return _limited(_named(place, split, key, stream), limit, start, stop)


def _part(name: str, key: str) -> tuple[str, int, int | None]:
    """Return a name without `[start:stop]` at its end, and start and stop; of a file called so it is the name."""
    match = PART.fullmatch(name)
    if match is None or Path(name).expanduser().exists():
        return name, 0, None
    start, stop = int(match[2] or 0), int(match[3]) if match[3] else None
    if stop is not None and stop <= start:
        raise UserError(
            f"{key}={name}: there is no row from {start} to {stop}; the first row is 0, the last is excluded"
        )
    return match[1], start, stop


def _named(name: str, split: str, key: str, stream: bool) -> Source:
    """Return the source of a path, a pattern, or a name of the hub."""
    path = Path(name).expanduser()
    with _readable(f"{key}={name}"):
        if path.is_dir():
            return _folder(path, split, stream, key)
        if path.is_file():
            return _file(path, stream)
        if path.exists() or path.is_symlink():
            regular(path)
        if set(PATTERN) & set(name):
            return _files(_matching(path, key), name, stream)
    first, _, rest = name.partition(":")
    if rest and Path(first).expanduser().is_dir():
        return _folder(Path(first).expanduser(), rest, stream, key)
    if name.endswith(FORMATS) or name.startswith((".", "/", "~")):
        where = path.parent if path.parent.is_dir() else Path(".")
        hint = nearest(path.name, (p.name for p in where.iterdir()))
        raise UserError(f"{key}: there is no file {path}.{hint}")
    return _hub(name, split, stream, key)


def _limited(source: Source, limit: int | None, start: int = 0, stop: int | None = None) -> Source:
    """Return the rows of a source from `start` to `stop`, and of these the first `limit`."""
    name = source.name if not start and stop is None else f"{source.name}[{start}:{'' if stop is None else stop}]"
    stop = min((end for end in (stop, None if limit is None else start + limit) if end is not None), default=None)
    if stop is None and not start:
        return source
    key = _digest(f"{source.key}:{f'{start}:' if start else ''}{stop}".encode())

    def count() -> int | None:
        total = source.count()
        if total is None:
            return None if stop is None else stop - start
        return max((total if stop is None else min(stop, total)) - start, 0)

    return Source(name, key, lambda: itertools.islice(source.rows(), start, stop), count)


def _numbered(rows: Any) -> Iterator[tuple[str, Row]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from error


def _file(path: Path, stream: bool) -> Source:
    regular(path)
    if not str(path).endswith(FORMATS):
        raise UserError(f"{path}: unknown format; use one of {', '.join(FORMATS)}")
    stat = path.stat()
    key = _digest(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}".encode()) if stream else file_digest(path)
    return Source(str(path), key, lambda: _numbered(read_file(path)), lambda: count_rows(path))


def _files(paths: Sequence[Path], name: str, stream: bool) -> Source:
    """Return the rows of several files as one source, file after file."""
    parts = [_file(path, stream) for path in paths]

    def rows() -> Iterator[tuple[str, Row]]:
        for part in parts:
            for where, row in part.rows():
                yield f"{Path(part.name).name}, {where}", row

    key = _digest("".join(part.key for part in parts).encode())
    return Source(name, key, rows, lambda: sum(part.count() or 0 for part in parts))


def several(parts: Sequence[Source], name: str, weights: Sequence[float], stream: bool = False) -> Source:
    """Return a list of sources as one: one after the other, or as a stream mixed by their weights."""
    names = [part.name for part in parts]
    if twice := sorted({part for part in names if names.count(part) > 1}):
        raise UserError(f"{name} names {twice[0]} twice; data.weights draws more rows of a source")

    def rows() -> Iterator[tuple[str, Row]]:
        placed = [lambda part=part: ((f"{part.name}, {where}", row) for where, row in part.rows()) for part in parts]
        return interleaved(placed, weights) if stream and weights else itertools.chain(*(read() for read in placed))

    key = _digest(json.dumps([[part.key for part in parts], *([weights] if stream else [])]).encode())
    counts = (lambda: None) if stream else (lambda: sum(part.count() or 0 for part in parts))
    return Source(name, key, rows, counts, tuple(parts), tuple(weights))


def _matching(pattern: Path, key: str) -> list[Path]:
    found = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True))
    files = [path for path in found if path.is_file() and path.name.endswith(FORMATS)]
    if not files:
        reason = f"none of {len(found)} matches is a {', '.join(FORMATS)} file" if found else "nothing matches it"
        raise UserError(f"{key}={pattern}: {reason}")
    return files


def _folder(path: Path, split: str, stream: bool, key: str) -> Source:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(path, split, key)
    files = sorted(p for p in path.rglob("*") if p.name.endswith(FORMATS) and not p.is_dir())
    selected = [p for p in files if p.name.startswith(SPLITS.get(split, (split,)))]
    if not selected and split == "train":  # files without a split in their name are for training
        selected = [p for p in files if not p.name.startswith(SPLITS["val"])]
    if not selected:
        kinds = f"{', '.join(FORMATS)} file for {split}"
        contents = f"; it contains {', '.join(p.name for p in files[:5])}" if files else ""
        raise UserError(f"{key}: the folder {path} contains no {kinds}{contents}")
    return _files(selected, str(path) if split in SPLITS else f"{path}:{split}", stream)


def _saved(path: Path, split: str, key: str) -> Source:
    """Return the rows of a folder written by `datasets`."""
    import datasets

    try:
        _check_saved(path)
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # damaged files raise types of several packages
        raise UserError(f"{key}: the data set {path} cannot be read ({_reason(error)})") from error
    if isinstance(dataset, datasets.DatasetDict):
        dataset = _pick(dataset, split, str(path), key)
    elif split not in SPLITS:
        raise UserError(f"{key}: {path} is one split, there is no {split} in it")
    name = str(path) if split in SPLITS else f"{path}:{split}"
    return Source(name, _content(dataset, split), lambda: _guarded(dataset, name), lambda: len(dataset))


def _check_saved(path: Path) -> None:
    """Raise a UserError when a data set of save_to_disk names files that are not beside its state."""
    for state in path.rglob("state.json"):
        files = (read_json(state) or {}).get("_data_files")
        for file in files if isinstance(files, list) else ():
            name = str(file.get("filename") if isinstance(file, dict) else file)
            if Path(name).name != name:
                raise UserError(f"{state} names {name!r}, which is no file beside it")
            regular(state.parent / name)


def _pick(splits: Any, split: str, name: str, key: str) -> Any:
    """Return the split of that name; of "train" and "val" also under its other names."""
    for candidate in SPLITS.get(split, (split,)):
        if candidate in splits:
            return splits[candidate]
    likely = next((other for other in splits if other.startswith(split)), next(iter(splits), split))
    advice = f" Choose one with {key}={name}:{likely}" if split in SPLITS else nearest(split, splits)
    raise UserError(f"{key}: {name} has the splits {', '.join(splits)}, none of them for {split}.{advice}")


def _content(dataset: Any, split: str) -> str:
    """Return the key of a `datasets.Dataset`: split, size, and the content of its Arrow files."""
    content = file_digest(*(Path(file["filename"]) for file in dataset.cache_files))
    return _digest(f"{split}:{dataset.num_rows}:{content}".encode())


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _guarded(dataset: Any, name: str) -> Iterator[tuple[str, Row]]:
    """Yield the numbered rows of a data set of `datasets`, which raises types of several packages."""
    number = 0
    try:
        for number, row in enumerate(dataset, start=1):
            yield f"row {number}", row
    except (UserError, RowError, GeneratorExit):
        raise
    except Exception as error:
        raise UserError(f"{name}, row {number + 1}: the data set cannot be read ({_reason(error)})") from error


def _hub(name: str, split: str, stream: bool, key: str) -> Source:
    """Return a data set of the hub: `name`, `name:split`, `name:configuration`, or `name:configuration:split`."""
    import datasets

    place, *chosen = name.split(":")
    if len(chosen) > 2:
        raise UserError(f"{key}={name}: a data set is name, name:split, or name:configuration:split")

    def load(configuration: str | None) -> Any:
        named: list[Any] = [configuration] if configuration else []
        options: dict[str, Any] = {"streaming": stream}
        return datasets.load_dataset(place, *named, **options)

    try:
        splits, wanted = _loaded(load, chosen, split)
    except Exception as error:  # datasets raises a dozen types for "not reachable" and "not there"
        raise UserError(
            f"{key}={name} is no local file or folder, and could not be loaded from the hub: {_reason(error)}"
        ) from error
    dataset = _pick(splits, wanted, ":".join([place, *chosen[:-1]]), key)
    if stream:
        return Source(name, _digest(f"{name}:{split}".encode()), lambda: _guarded(dataset, name), lambda: None)
    return Source(name, _content(dataset, wanted), lambda: _guarded(dataset, name), lambda: len(dataset))


def _loaded(load: Callable[[str | None], Any], chosen: Sequence[str], split: str) -> tuple[Any, str]:
    """Return the splits of a data set, and which is wanted: one name is a split, or else a configuration."""
    if len(chosen) != 1:
        return load(chosen[0] if chosen else None), (chosen[1] if chosen else "") or split
    try:
        splits = load(None)
    except ValueError:  # it has several configurations and no default
        return load(chosen[0]), split
    if chosen[0] in splits:
        return splits, chosen[0]
    try:
        return load(chosen[0]), split
    except ValueError:  # no configuration either: the message names the splits
        return splits, chosen[0]


def _world(kind: str, split: str, limit: int | None, options: Row) -> Source:
    from rlhf_lightning import world

    sizes = {"train": options.pop("rows", 4096), "val": options.pop("val_rows", 512)}
    kind = options.pop("records", None) or kind
    seed = options.pop("seed", 0)
    size = limit or sizes[split]
    key = json.dumps([world.VERSION, kind, split, size, seed, options], sort_keys=True)
    return Source(
        f"{WORLD} ({kind})",
        _digest(key.encode()),
        lambda: _numbered(world.rows(kind, size, seed=seed, split=split, **options)),
        lambda: size,
    )


def is_local(name: Any) -> bool:
    """Return whether a source is a file, a folder or a pattern of files of this machine."""
    places = (str(name), str(name).partition(":")[0], str(name).partition("[")[0])
    return isinstance(name, str) and (
        any(Path(p).expanduser().exists() for p in places) or bool(set(PATTERN) & set(name))
    )


def texts_of(value: Any) -> Iterator[str]:
    """Yield every text inside a row, without lone surrogates; a row with one is refused later, with its number."""
    if isinstance(value, str):
        yield value.encode(errors="ignore").decode()
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_of(inner)
