"""The rooms of the package and what each may import; declared dependencies, shipped packages, words."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from rlhf_lightning.stages import STAGES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf_lightning"
ROOMS = [
    "errors", "distributed", "files", "ops", "world", "models", "data", "generation", "judges", "rewards", "modules",
    "callbacks", "feedback", "evaluation", "runtime", "stages", "__main__",
]  # fmt: skip
"""Each imports only from those before it, and itself."""
APART = {("feedback", "evaluation"), ("evaluation", "feedback")}
CONFIGURED = {"runtime", "stages", "__main__"}
"""Where Hydra and OmegaConf may be imported."""
TORCH_FREE = {"errors", "files", "world"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {"gguf", "httpx2", "openai", "starlette", "uvicorn"}  # imported behind a check, declared as an extra
FILES = sorted(PACKAGE.rglob("*.py"))


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(file: Path) -> Iterator[str]:
    """Yield the modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "rlhf_lightning":
                yield from (f"rlhf_lightning.{alias.name}" for alias in node.names)


def test_every_file_is_in_a_room() -> None:
    assert {room(file) for file in FILES} - {"__init__"} == set(ROOMS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROOMS)
def test_rooms_import_from_those_before_them(name: str) -> None:
    for file in (file for file in FILES if room(file) == name):
        for module in imported(file):
            top, *rest = module.split(".")
            if top == "rlhf_lightning" and rest and rest[0] in ROOMS:
                assert ROOMS.index(rest[0]) <= ROOMS.index(name), f"{file.relative_to(ROOT)} imports {module}"
                assert (name, rest[0]) not in APART, f"{file.relative_to(ROOT)} imports {module}"
            assert top not in ("hydra", "omegaconf") or name in CONFIGURED, f"{file.relative_to(ROOT)} imports {module}"
            assert top not in ("torch", "transformers", "lightning") or name not in TORCH_FREE, file
            assert top != "pytorch_lightning", file


@pytest.mark.slow
def test_declared_dependencies_are_the_imported_ones() -> None:
    distributions = packages_distributions()
    tops = {module.partition(".")[0] for file in FILES for module in imported(file)}
    tops -= {*sys.stdlib_module_names, "rlhf_lightning"} | EXTRAS
    used = {distributions[top][0].lower().replace("_", "-") for top in tops}
    declared = {re.split(r"[<>=~\[ ]", line)[0].lower() for line in PROJECT["dependencies"]}
    assert used | {"tensorboard"} == declared  # that is imported by torch.utils.tensorboard


def test_the_wheel_ships_every_package() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {file.parent for file in PACKAGE.rglob("__init__.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert listed == packages | {"rlhf_lightning.conf"}


@pytest.mark.slow
def test_nobody_compares_with_the_name_of_a_stage() -> None:
    """What a stage is, its row says; a comparison elsewhere would be forgotten when the next stage comes."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare) and "stage" in ast.unparse(node):
                texts = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                assert not texts & set(STAGES), f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"


def test_files_are_of_a_size_to_read() -> None:
    for file in FILES:
        assert len(file.read_text().splitlines()) <= 400, file


def test_public_names_are_typed() -> None:
    """What a type checker sees is what `__getattr__` finds."""
    import rlhf_lightning

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed | {"__version__"} == set(rlhf_lightning.__all__)
    assert all(getattr(rlhf_lightning, name) is not None for name in typed)
    assert (PACKAGE / "py.typed").is_file()
