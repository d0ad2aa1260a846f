"""What `reward_from` means, and that a changed reward is another reward."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.spec import digests, parse


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with rewards that import from it in every way."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards").mkdir()
    files = {
        "plain.py": "import helper\nraise SystemExit('nothing here is imported')\n",
        "helper.py": "from rewards import words\nimport json\n",
        "rewards/__init__.py": "",
        "rewards/words.py": "GOOD = ['gold']\n",
        "rewards/judge.py": "from .words import GOOD\nfrom . import scale\n",
        "rewards/scale.py": "FACTOR = 2\n",
        "unrelated.py": "x = 1\n",
        "broken.py": "def (\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_kind_is_told_by_its_name(tmp_path: Path) -> None:
    specs = parse(["world", str(tmp_path), "my_rewards:length"])
    assert [(spec.kind, spec.is_model) for spec in specs] == [("world", False), ("folder", True), ("function", False)]
    assert parse(None) == parse([]) == []
    assert [spec.name for spec in parse("a.b:c")] == ["a.b:c"]


@pytest.mark.parametrize("name", ["my_rewards", "runs/typo", ":length", "my_rewards:", "a/b:c"])
def test_what_is_no_reward_is_refused_with_its_key(name: str) -> None:
    with pytest.raises(UserError, match=f"gold_from='{name}' is neither a reward model folder"):
        parse(["world", name], "gold_from")


@pytest.mark.parametrize(
    ("reward", "changed", "differs"),
    [
        ("plain:f", "plain.py", True),
        ("plain:f", "helper.py", True),  # imports it
        ("plain:f", "rewards/words.py", True),  # imports what imports it, as a name of a package
        ("plain:f", "unrelated.py", False),
        ("rewards.judge:f", "rewards/words.py", True),  # a relative import
        ("rewards.judge:f", "rewards/scale.py", True),  # of a module as a name
        ("rewards.judge:f", "rewards/__init__.py", True),
        ("rewards.judge:f", "plain.py", False),
        (["world", "rewards.judge:f"], "rewards/scale.py", True),  # inside a list
        ("broken:f", "broken.py", True),  # the import will say what is wrong with it
    ],
)
def test_a_reward_changes_with_what_it_imports_from_here(
    package: Path, reward: str | list[str], changed: str, differs: bool
) -> None:
    before = digests(reward)
    assert None not in before
    (package / changed).write_text((package / changed).read_text() + "# changed\n")
    assert (digests(reward) != before) is differs


def test_what_is_installed_below_the_working_directory_does_not_count(package: Path) -> None:
    """With an environment in the working directory a reward that imports torch would read all of it."""
    installed = package / ".venv" / "lib" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "library.py").write_text("x = 1")
    (package / "uses.py").write_text("import library, helper")
    sys.path.append(str(installed))
    try:
        before = digests("uses:f")
        (installed / "library.py").write_text("x = 2")
        assert digests("uses:f") == before
        (package / "helper.py").write_text("y = 2")
        assert digests("uses:f") != before
    finally:
        sys.path.remove(str(installed))


def test_a_module_that_is_not_here_has_no_digest(package: Path) -> None:
    assert digests(["nowhere.at.all:f", "sys:exit"]) == [None, None]
    assert digests("rlhf_lightning.rewards.checkers:exact_answer") != [None]
