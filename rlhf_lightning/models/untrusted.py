"""Model folders of others: what is refused before anything in them is opened by a library.

Code in a folder is never imported and pickles are never read; here it is about files that never end, indexes that lead
elsewhere, and numbers that would fill the memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rlhf_lightning.errors import UserError
from rlhf_lightning.files import read_json, regular

WEIGHTS = ".safetensors"
LARGEST_JSON = 10_000_000  # bytes of a config; tokenizer.json and vocabularies are larger
COUNTED = ("layer", "block")  # in the names of keys that count modules; each has a tensor
SIZED = (
    "size",
    "dim",
    "dimension",
    "embd",
    "head",
    "inner",
    "expert",
    "hidden",
    "model",
    "positions",
    "ctx",
)  # that size a tensor
UNBOUNDED = (
    "bytes",
    "image",
    "max",
    "window",
    "chunk",
    "pad",
    "token",
    "sliding",
    "top",
    "model_type",
)  # that size none


def check_folder(folder: str | Path) -> None:
    """Raise a UserError for a model folder that a library could not open safely, or not in bounded time and memory."""
    folder = Path(folder)
    files = [regular(path) for path in folder.iterdir() if not path.is_dir()]
    for file in files:
        if file.name.endswith(".index.json"):
            check_index(file)
    configs = {file.name: read_config(file) for file in files if file.name in ("config.json", "adapter_config.json")}
    if adapter := configs.get("adapter_config.json"):
        check_adapter(folder, adapter)
    if config := configs.get("config.json"):
        weights = [file for file in files if file.name.endswith(WEIGHTS) and not file.name.startswith("adapter")]
        check_config(folder, config, weights)


def read_config(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model folder."""
    if file.stat().st_size > LARGEST_JSON:
        raise UserError(f"{file} has {file.stat().st_size} bytes; a config has at most {LARGEST_JSON}")
    return read_json(file) or {}


def check_index(file: Path) -> None:
    """Raise a UserError for an index of weights that names anything but safetensors files beside it."""
    shards = read_json(file) or {}
    names = shards.get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{file} has no weight_map")
    for name in set(map(str, names.values())):
        if not name.endswith(WEIGHTS):
            if file.name.endswith(f"{WEIGHTS}.index.json"):
                raise UserError(f"{file} names {name!r}; only {WEIGHTS} files are read")
        elif Path(name).name != name or not (file.parent / name).is_file():
            raise UserError(f"{file} names {name!r}, which is no file beside it")


def check_adapter(folder: Path, adapter: dict[str, Any]) -> None:
    """Raise a UserError for an adapter whose weights are pickled, whose class is imported, or whose base is none."""
    if not (folder / f"adapter_model{WEIGHTS}").is_file():
        raise UserError(f"{folder} has no adapter_model{WEIGHTS}; only {WEIGHTS} files are read")
    if adapter.get("auto_mapping"):
        raise UserError(f"{folder / 'adapter_config.json'}: auto_mapping names a class to import, which is not done")
    base = adapter.get("base_model_name_or_path")
    if base is not None and (not isinstance(base, str) or ".." in Path(base).parts or "://" in base):
        raise UserError(f"{folder / 'adapter_config.json'}: base_model_name_or_path={base!r} is no model")


def check_config(folder: Path, config: dict[str, Any], weights: list[Path]) -> None:
    """Raise a UserError for a config whose sizes the weights beside it cannot have.

    Args:
        weights: the safetensors files, all of the model's.
    """
    shapes = dict(tensor_shapes(weights))
    elements = sum(math.prod(shape) for shape in shapes.values())
    for key, value in numbers(config):
        name = key.rpartition(".")[2].lower()
        if name.endswith("attn_implementation") and "/" in str(value):
            raise UserError(f"{folder / 'config.json'}: {key}={value} is code from the hub, which is not run")
        if isinstance(value, str) or not shapes:
            continue
        if value < 0 and any(word in name for word in COUNTED):
            raise UserError(f"{folder / 'config.json'}: {key}={value} is negative")
        if any(word in name for word in COUNTED) and value > len(shapes):
            raise UserError(f"{folder / 'config.json'}: {key}={value}, but its weights are {len(shapes)} tensors")
        sized = any(word in name for word in SIZED) and not any(word in name for word in UNBOUNDED)
        if sized and value > elements:
            raise UserError(f"{folder / 'config.json'}: {key}={value}, but its weights have {elements} elements")


def tensor_shapes(files: list[Path]) -> Iterator[tuple[str, list[int]]]:
    """Yield (name, shape) of the tensors in safetensors files, from their headers."""
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                yield from ((name, opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{file} does not hold a usable model: {error}") from error


def numbers(node: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, int | str]]:
    """Yield (key, value) for every whole number and text below `node`, dicts and lists of a config."""
    if depth > 20:
        raise UserError(f"config.json is nested too deeply, at {path[:200]}")
    if isinstance(node, dict):
        for key, value in node.items():
            yield from numbers(value, f"{path}.{key}" if path else str(key), depth + 1)
    elif isinstance(node, list):
        for value in node:
            yield from numbers(value, path, depth + 1)
    elif isinstance(node, int | str) and not isinstance(node, bool):
        yield path, node


def check_gguf(path: Path) -> None:
    """Raise a UserError for a GGUF file whose header is not one, or counts more than the file has room for."""
    with regular(path).open("rb") as opened:
        header = opened.read(24)
    magic, version = header[:4], int.from_bytes(header[4:8], "little")
    tensors, values = (int.from_bytes(header[place : place + 8], "little") for place in (8, 16))
    if magic != b"GGUF" or len(header) < 24 or version not in (2, 3):
        raise UserError(f"{path} is not a GGUF file of version 2 or 3")
    if min(tensors, values) < 1 or 12 * (tensors + values) > path.stat().st_size:  # a name, a kind and a value each
        raise UserError(f"{path} is damaged: its header counts {tensors} tensors and {values} values")
