"""Every planted mistake still fits the source, and the quick ones are caught."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.mutants.check import ROOT, Mutant, PatchError, load

MUTANTS = load()


def test_every_mutant_changes_one_place_and_stays_python(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "rlhf_lightning", tmp_path / "package")
    dump = cache(lambda source: ast.dump(ast.parse(source)))  # of a file, once for its many mutants
    for mutant in MUTANTS:
        path = tmp_path / "package" / mutant.file
        source = path.read_text()
        mutant.apply(tmp_path / "package")
        assert dump(path.read_text()) != dump(source), f"{mutant.name} changes no code"
        path.write_text(source)


def test_the_tests_named_exist() -> None:
    for mutant in MUTANTS:
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text(), f"{mutant.name}: {test}"


def test_there_are_many_and_their_names_differ() -> None:
    assert len(MUTANTS) >= 40
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert all(mutant.source for mutant in MUTANTS)


def test_a_text_that_is_gone_is_told(tmp_path: Path) -> None:
    (tmp_path / "kl.py").write_text("x = 1\nx = 1\n")
    for old, count in (("y = 1", 0), ("x = 1", 2)):
        with pytest.raises(PatchError, match=rf"sign: the text to replace is {count} times in kl\.py"):
            Mutant("sign", "", "kl.py", old, "", ()).apply(tmp_path)


@pytest.mark.slow
def test_the_fast_subset_is_caught() -> None:
    command = [sys.executable, "tests/mutants/check.py", "--fast"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert found.returncode == 0, found.stdout + found.stderr


ENTRY = "- {{name: {name}, source: x, from: '{old}', to: '{new}', tests: [ops/test_kl.py]}}\n"


@pytest.mark.slow
def test_only_a_test_that_fails_catches_a_mutant(tmp_path: Path) -> None:
    """Neither a harmless change, nor a package that cannot be imported, nor a text that is gone counts as caught."""
    path = tmp_path / "mutants.yaml"
    path.write_text(
        "ops/kl.py:\n"
        + ENTRY.format(name="sign", old="rewards = -beta", new="rewards = beta")
        + ENTRY.format(name="harmless", old="return 0.5 * x**2", new="return x**2 * 0.5")
        + ENTRY.format(name="broken", old="import math", new="import nothing_of_this_name")
        + ENTRY.format(name="gone", old="no such text", new="x")
    )
    command = [sys.executable, "tests/mutants/check.py", "--lists", str(path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert found.returncode == 1, found.stdout + found.stderr
    assert "1 of 4 caught" in found.stdout
    for line in found.stdout.splitlines():
        if any(name in line for name in ("harmless", "broken", "gone")):
            assert "SURVIVED" in line
