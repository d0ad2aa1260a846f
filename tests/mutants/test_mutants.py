"""Every planted mistake still fits the source, and only a test that fails catches one."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.mutants.check import ROOT, Mutant, PatchError, load

MUTANTS = load()
PACKAGE = ROOT / "rlhf_lightning"


@pytest.mark.slow
def test_every_mutant_changes_one_place_and_stays_python() -> None:
    source = cache(Path.read_text)  # of a file, once for its many mutants
    before = cache(lambda path: ast.unparse(ast.parse(source(path))))
    for mutant in MUTANTS:
        path = mutant.file(PACKAGE)
        changed = mutant.mutated(source(path), PACKAGE)
        assert changed != before(path), f"{mutant.name} changes no code"
        compile(changed, path, "exec")


def test_the_tests_named_exist() -> None:
    for mutant in MUTANTS:
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text(), f"{mutant.name}: {test}"


def test_there_are_many_and_their_names_differ() -> None:
    assert len(MUTANTS) >= 80
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert all(mutant.source for mutant in MUTANTS)


SOURCE = """
class KL:
    @decorated
    def sign(x, scale=2.0):
        y = (x  # a comment
             - 1) * scale
        y = y * scale
        return y

    def other(x):
        return (x - 1) * scale
"""


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("(x - 1) * scale", "x", "y = x\n"),
        ("x-1", "x", "y = x * scale\n"),
        ("y = (x - 1) * scale", "pass", "    pass\n"),
        ("y = y*scale", "y = 1; z = 2", "y = 1\n        z = 2\n"),
        ("decorated", "other", "@other\n"),
        ("2.0", "3.0", "def sign(x, scale=3.0)"),
        ("return y", "return x", "return x\n"),
    ],
)
def test_code_is_found_whatever_its_formatting(old: str, new: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "kl.py").write_text(SOURCE)
    Mutant("sign", "", "ops.kl.KL.sign", old, new, ()).apply(tmp_path)
    changed = (tmp_path / "ops" / "kl.py").read_text()
    assert line in changed
    assert changed.endswith("return (x - 1) * scale")  # another function is left alone


@pytest.mark.parametrize(
    ("where", "old", "message"),
    [
        ("kl.KL.sign", "x - 2", r"sign: 'x - 2' occurs 0 times in kl\.KL\.sign, not once"),
        ("kl.KL.sign", "scale", r"sign: 'scale' occurs 2 times in kl\.KL\.sign, not once"),
        ("kl.KL.minus", "x", r"sign: there is no kl\.KL\.minus"),
        ("lk.KL.sign", "x", r"sign: there is no module of lk\.KL\.sign"),
    ],
)
def test_what_is_not_there_once_is_told(where: str, old: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "kl.py").write_text(SOURCE)
    with pytest.raises(PatchError, match=message):
        Mutant("sign", "", where, old, "1", ()).apply(tmp_path)


ENTRY = "{where}:\n- {{name: {name}, source: x, from: '{old}', to: '{new}', tests: [ops/test_kl.py]}}\n"


@pytest.mark.nightly
@pytest.mark.slow
def test_only_a_test_that_fails_catches_a_mutant(tmp_path: Path) -> None:
    """Neither a harmless change, nor a package that cannot be imported, nor code that is not there counts as caught."""
    path = tmp_path / "mutants.yaml"
    path.write_text(
        ENTRY.format(where="ops.kl.token_rewards", name="sign", old="-beta * kl * mask", new="beta * kl * mask")
        + ENTRY.format(where="ops.kl.kl_estimate", name="harmless", old="0.5 * x**2", new="x**2 * 0.5")
        + ENTRY.format(where="ops.kl", name="broken", old="import math", new="import nothing_of_this_name")
        + ENTRY.format(where="ops.kl.best_of_n_kl", name="gone", old="no_such_code", new="x")
    )
    command = [sys.executable, "tests/mutants/check.py", "--lists", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of 4 caught" in done.stdout
    for line in done.stdout.splitlines():
        if any(name in line for name in ("harmless", "broken", "gone")):
            assert "SURVIVED" in line
