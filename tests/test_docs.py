"""README and docs hold: links lead somewhere, Python blocks run, commands compose."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rlhf_lightning.__main__ import normalize
from rlhf_lightning.models.tiny import build_tiny
from rlhf_lightning.runtime.composition import judge_of_command
from tests.helpers.compose import composed
from tests.helpers.lightning import quiet_lightning

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
ROWS = '{"prompt": "Say hello.", "response": "Hello!"}\n' * 32


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
@quiet_lightning
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [body for language, body in BLOCK.findall(page.read_text()) if language == "python"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demos.jsonl").write_text(ROWS)
    folder = build_tiny(tmp_path / "model", ["Say hello. Hello!"], vocab_size=270, hidden_size=16, layers=1, heads=2)
    for body in blocks:
        body = body.replace("path/or/hub-name", folder).replace("max_steps=100", "max_steps=1")
        exec(compile(body, str(page), "exec"), {"__name__": "docs"})


def commands() -> list[str]:
    found = []
    for page in PAGES:
        text = page.read_text()
        found += re.findall(r"^\|.*`(rlhf (?:-m )?\w+=\w[^`]*)`", text, re.M)  # of tables
        for language, body in BLOCK.findall(text):
            if language in ("bash", "sh", ""):
                lines = body.replace("\\\n", " ").splitlines()
                found += [line.split("  #")[0].strip() for line in lines if line.strip().startswith("rlhf ")]
    return sorted(set(found))


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_commands_compose(command: str) -> None:
    words = shlex.split(command.replace("<", "").replace(">", "").replace("...", ""))[1:]
    overrides = normalize([w for w in words if "=" in w and not w.startswith("hydra.")])
    overrides = [o if "=[" in o or "={" in o else o.split(",")[0] for o in overrides]  # of a sweep the first value
    composed(*overrides, *judge_of_command(overrides))
