"""What `reward_from` and `gold_from` mean. The kinds of reward are the rows of one table; importing it is light."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import UserError
from rlhf_lightning.files import file_digest
from rlhf_lightning.models.folder import weights_key


@dataclass(frozen=True)
class Kind:
    """A kind of reward.

    Args:
        matches: returns whether a text names a reward of this kind.
        digest: returns what changes when the reward does; None where that is unknown.
        loader: `module:function` that builds the reward from (name, dtype), a model from (name, dtype, how).
        is_model: the name is a model folder, a parent of the stage.
        settings: the key of the configuration whose value the loader gets as a third argument, or None.
    """

    matches: Callable[[str], bool]
    digest: Callable[[str], str | None]
    loader: str
    is_model: bool = False
    settings: str | None = None


@dataclass(frozen=True)
class RewardSpec:
    """One reward: its kind, a row of `KINDS`, and its name."""

    kind: str
    name: str

    def digest(self) -> str | None:
        """Return what changes when the reward does: its weights, its source, the version of the world."""
        return KINDS[self.kind].digest(self.name)

    def load(self, dtype: str, how: Any = "mean", settings: Mapping[str, Any] | None = None) -> Any:
        """Build the reward.

        Args:
            dtype, how: of a model that of its weights, and the combination of its groups' heads.
            settings: the configuration, for rewards that have settings of their own.
        """
        module, _, function = KINDS[self.kind].loader.partition(":")
        load = getattr(importlib.import_module(module), function)
        if key := KINDS[self.kind].settings:
            return load(self.name, dtype, (settings or {}).get(key))
        return load(self.name, dtype, how) if self.is_model else load(self.name, dtype)

    @property
    def is_model(self) -> bool:
        """Whether it is a model folder."""
        return KINDS[self.kind].is_model


def parse(value: Any, key: str = "reward_from") -> list[RewardSpec]:
    """Return the rewards that a value of `reward_from` or `gold_from` names: none for null, several for a list or map.

    Raises:
        UserError: a text that is no kind of reward.
    """
    specs = []
    for place, name in _named(value, key):
        kind = next((kind for kind, row in KINDS.items() if row.matches(name)), None)
        if kind is None:
            raise UserError(
                f"{place}={name!r} is neither a reward model folder, 'module:function', 'judge:<judge>', 'world', nor "
                "'world:<group>'"
            )
        specs.append(RewardSpec(kind, name))
    return specs


def judges(value: Any, key: str = "reward_from") -> list[str]:
    """Return the options of conf/judge that a value names as `judge:<option>`; what else it names may not exist."""
    return [name.partition(":")[2] for _, name in _named(value, key) if KINDS["judge"].matches(name)]


def _named(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield (key, text) of every reward in a text, list or map."""
    if isinstance(value, list | tuple):
        for member in value:
            yield from _named(member, key)
    elif isinstance(value, Mapping):
        for name, member in value.items():
            yield from _named(member, f"{key}.{name}")
    elif value is not None and value != "":
        yield key, str(value)


def digests(value: Any) -> list[str | None]:
    """Return the digest of every reward that `value` names, for the identity of a run or of a pipeline's stage."""
    return [spec.digest() for spec in parse(value)]


def _is_function(name: str) -> bool:
    module, _, function = name.partition(":")
    return bool(module and function) and "/" not in module


def _world_version(name: str) -> str:
    from rlhf_lightning.world import VERSION

    return f"world {VERSION}"


def _judge_version(name: str) -> str:
    from rlhf_lightning.judges.prompts import VERSION

    return f"{name} {VERSION}"  # its settings and models are the run's


# ---- functions -----------------------------------------------------------------------------------------------------


def source_digest(name: str) -> str | None:
    """Return the digest of a reward's `module:function`: its file, and the user's files that it imports.

    Modules are located like an import but not imported; None where there is no such file. The user's files are those
    below the working directory, without installed packages.
    """
    module = name.partition(":")[0]
    start = _locate(module)
    if start is None:
        return None
    files, waiting = {start}, [(start, module)]
    while waiting:
        for imported in _imported_names(*waiting.pop()):
            location = _locate(imported)
            if location and location not in files and _is_users(location):
                files.add(location)
                waiting.append((location, imported))
    return file_digest(*sorted(files))


def _is_users(file: Path) -> bool:
    """Return whether a file is below the working directory and not in an environment there."""
    installed = {"site-packages", "dist-packages"} & set(file.parts) or file.is_relative_to(sys.prefix)
    return file.is_relative_to(Path.cwd()) and not installed


def _locate(module: str) -> Path | None:
    """Return the source file of a module, not imported, or None."""
    spec, path = None, [str(Path.cwd()), *sys.path]
    for part in module.split("."):
        spec = PathFinder.find_spec(part, path)
        path = list(spec.submodule_search_locations or []) if spec else []
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _imported_names(file: Path, module: str) -> Iterator[str]:
    """Yield the dotted names that the source of `module` imports: modules, and what may be a module inside one."""
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # reported by the import
        return
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name not in sys.stdlib_module_names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base:
                yield base
            yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names)


KINDS = {
    "world": Kind(
        lambda name: name.partition(":")[0] == "world", _world_version, "rlhf_lightning.rewards.functions:load_world"
    ),
    "folder": Kind(
        lambda name: Path(name).is_dir(), weights_key, "rlhf_lightning.rewards.folder:load_folder", is_model=True
    ),
    "judge": Kind(
        lambda name: name.partition(":")[0] == "judge",  # reserved: no function of a module of that name
        _judge_version,
        "rlhf_lightning.rewards.judged:load_judged",
        settings="judge",
    ),
    "function": Kind(_is_function, source_digest, "rlhf_lightning.rewards.functions:load_function"),
}
