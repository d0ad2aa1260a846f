"""Constitutions: the principles that a model judges, criticizes and revises by, read from YAML."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.files import fingerprint, regular

SHIPPED = Path(__file__).with_name("constitutions")
LARGEST = 1 << 18
"""Bytes of a file."""


@dataclass(frozen=True)
class Principle:
    """One thing that is asked of a response.

    Args:
        name: of the principle, which labels and revisions record.
        judge: what a judge is asked to prefer.
        critique: asks for the weaknesses of the last response in this light.
        revise: asks for a better response after the critique.
    """

    name: str
    judge: str
    critique: str = "Name the most important way in which your last answer could be better."
    revise: str = "Write your answer again without that weakness. Write only the new answer."


@dataclass(frozen=True)
class Conflict:
    """Which principle comes first where two want different things."""

    name: str
    rule: str


@dataclass(frozen=True)
class Example:
    """A critique and a revision by the principle of that name, shown to models that follow no instructions."""

    principle: str
    prompt: str
    response: str
    critique: str
    revision: str


@dataclass(frozen=True)
class Constitution:
    """Principles, the rules for their conflicts, and examples."""

    principles: tuple[Principle, ...]
    conflicts: tuple[Conflict, ...] = ()
    examples: tuple[Example, ...] = field(default=())

    @property
    def rules(self) -> str:
        """The rules for conflicts as one text."""
        return " ".join(conflict.rule for conflict in self.conflicts)

    @property
    def digest(self) -> str:
        """What changes when any of its texts does."""
        return fingerprint(asdict(self))

    def sample(self, *seed_parts: int | str) -> Principle:
        """Return a principle, each equally likely; the same for the same `seed_parts`."""
        return random.Random(":".join(map(str, (*seed_parts, "principle")))).choice(self.principles)

    def with_name(self, name: str) -> Principle:
        """Return the principle of that name."""
        return next(principle for principle in self.principles if principle.name == name)


def load_constitution(source: str | Path | Sequence[str]) -> Constitution:
    """Return a constitution.

    Args:
        source: the name of one of ours ("default", "world"), a YAML file, or a list of principles as texts.

    Raises:
        UserError: there is no such constitution, or the file is none.
    """
    if not isinstance(source, str | Path):
        texts = [{"name": f"principle-{i + 1}", "judge": text} for i, text in enumerate(source)]
        return build({"principles": texts}, "the list of principles")
    name = str(source)
    if "/" in name or name.endswith((".yaml", ".yml")):
        return build(read_yaml(Path(name)), name)
    names = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
    if name not in names:
        raise UserError(
            f"there is no constitution {name!r}: give one of {', '.join(names)}, or a file, such as ./{name}.yaml."
            f"{nearest(name, names)}"
        )
    return build(read_yaml(SHIPPED / f"{name}.yaml"), name)


def constitution_digests(settings: Mapping[str, Any]) -> list[str]:
    """Return the digest of every constitution that a setting names, of which the names are dotted."""
    named = [value for key, value in settings.items() if key.rpartition(".")[2] == "constitution" and value is not None]
    return [load_constitution(value).digest for value in named]


class Loader(yaml.SafeLoader):
    """YAML's plain types; a key that comes twice is an error, and so is a reference: nested ones grow without limit."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "references (*) are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise ConstructorError(None, None, f"{key!r} comes twice", node.value[place][0].start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Return what is in a YAML file of somebody else's.

    Raises:
        UserError: it cannot be read, is too large, or is no YAML of plain types.
    """
    file = regular(path.expanduser())
    try:
        with file.open("rb") as opened:
            content = opened.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UserError(f"constitution {path} has more than {LARGEST} bytes")
        return yaml.load(content.decode("utf-8"), Loader)
    except OSError as error:
        raise UserError(f"constitution {path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"constitution {path} is nested too deeply") from error
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"constitution {path} is not readable YAML: {' '.join(str(error).split())}") from error


def build(content: Any, where: str) -> Constitution:
    """Return the constitution that the plain containers of a file describe.

    Raises:
        UserError: naming the key that is missing, unknown, of the wrong type, or a name that comes twice.
    """
    table = checked(content, where, {"principles": True, "conflicts": False, "examples": False})
    principles = entries(Principle, table.get("principles"), f"{where}: principles")
    if not principles:
        raise UserError(f"{where} has no principles: a constitution needs at least one, with `name` and `judge`")
    conflicts = entries(Conflict, table.get("conflicts"), f"{where}: conflicts")
    examples = entries(Example, table.get("examples"), f"{where}: examples")
    names = [principle.name for principle in principles]
    for label, given in (("principles", names), ("conflicts", [conflict.name for conflict in conflicts])):
        if twice := next((name for place, name in enumerate(given) if name in given[:place]), None):
            raise UserError(f"{where}: two {label} have the name {twice!r}")
    for number, example in enumerate(examples):
        if example.principle not in names:
            raise UserError(
                f"{where}: examples[{number}].principle={example.principle!r} is not one of {', '.join(names)}."
                f"{nearest(example.principle, names)}"
            )
    return Constitution(tuple(principles), tuple(conflicts), tuple(examples))


def entries(kind: Any, listed: Any, where: str) -> list[Any]:
    """Return the members of a list as dataclasses whose fields are texts."""
    if listed is None:
        return []
    if not isinstance(listed, list):
        raise UserError(f"{where} is not a list but {kind_of(listed)}")
    needed = {f.name: f.default is MISSING for f in fields(kind)}
    made = []
    for number, member in enumerate(listed):
        place = f"{where}[{number}]"
        values = checked(member, place, needed)
        for key, text in values.items():
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{place}.{key} is not a text but {kind_of(text)}")
        made.append(kind(**{key: " ".join(text.split()) for key, text in values.items()}))
    return made


def checked(value: Any, where: str, keys: Mapping[str, bool]) -> dict[str, Any]:
    """Return a mapping that has no keys but `keys`, and all of those that are needed."""
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a mapping with {', '.join(keys)} but {kind_of(value)}")
    for key in value:
        if key not in keys:
            raise UserError(f"{where}: {key!r} is not one of {', '.join(keys)}.{nearest(str(key), keys)}")
    if missing := [key for key, needed in keys.items() if needed and key not in value]:
        hint = ": a constitution needs at least one" if missing == ["principles"] else ""
        raise UserError(f"{where} has no {', '.join(missing)}{hint}")
    return value


def kind_of(value: Any) -> str:
    """Return what a value of YAML is, for a message."""
    names = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}
    return "an empty text" if value == "" else names.get(type(value), f"{value!r:.40}")
