"""A session that silently ran no test of a tier is not a green one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASES = """
import pytest

def test_plain():
    pass

@pytest.mark.slow
def test_ran():
    pass

@pytest.mark.oracle
def test_left_out():
    pytest.skip("there is no oracle here")

@pytest.mark.nightly
def test_variant():
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "code", "more"),
    [
        ("slow", 0, []),
        ("slow,oracle,nightly", 1, []),
        ("dist", 1, ["-n", "1"]),
        ("slow,nightly", 1, ["-m", "not nightly"]),
    ],
)
def test_a_marker_without_a_passing_test_fails_the_session(
    tmp_path: Path, asked: str, code: int, more: list[str]
) -> None:
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n  slow: x\n  dist: x\n  oracle: x\n  browser: x\n  nightly: x\n"
    )
    left_out = "not nightly" in more
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.must_run", f"--must-run={asked}", *more]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True
    )
    assert done.returncode == code, done.stdout
    assert "unit 1 passed" in done.stdout
    assert "slow 1 passed" in done.stdout
    assert "oracle 0 passed" in done.stdout
    assert ("ERROR: no test marked" in done.stdout) == bool(code)
    assert f"nightly {int(not left_out)} passed" in done.stdout
    assert done.stdout.strip().splitlines()[-1].startswith(f"{2 if left_out else 3} passed, 1 skipped")


def test_make_test_asks_for_every_tier() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert '-m "not nightly" --must-run slow,dist,oracle,browser\n' in makefile
    assert "-m nightly --must-run nightly\n" in makefile
