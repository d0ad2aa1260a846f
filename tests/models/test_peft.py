"""Importing peft, and bitsandbytes with it, runs no code from the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("bitsandbytes")
PROGRAM = "import sys, rlhf_lightning.models.adapters; assert 'bitsandbytes' in sys.modules"


@pytest.mark.parametrize("installed", [True, False])
def test_bitsandbytes_asks_for_no_kernels(installed: bool, tmp_path: Path) -> None:
    """It would get them from the hub through this package, or complain that it is not there."""
    if installed:
        (tmp_path / "kernels.py").write_text(
            "def get_kernel(*_, **__):\n    raise SystemExit('get_kernel was called')\n"
        )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kernel" not in done.stderr
