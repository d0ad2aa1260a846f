"""The documentation site: it builds without a warning, refuses what is broken, and needs no network."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("site")]


def build(root: Path, into: Path) -> subprocess.CompletedProcess[str]:
    """Build a site as `make docs` does."""
    words = ["-q", "-W", "--keep-going", "-c", "docs/site", "-d", str(into / "doctrees"), ".", str(into / "site")]
    return subprocess.run([sys.executable, "-m", "sphinx", *words], cwd=root, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("docs")
    built = build(ROOT, into)
    assert (built.returncode, built.stderr) == (0, "")
    return into / "site"


def test_every_page_is_there_and_formulas_are_mathml(site: Path) -> None:
    sources = ["README", "CONTRIBUTING", "CHANGELOG", *(f"docs/{page.stem}" for page in (ROOT / "docs").glob("*.md"))]
    assert not [name for name in sources if not (site / f"{name}.html").is_file()]
    first = (site / "README.html").read_text()
    assert not [name for name in sources[1:] if f'href="{name}.html"' not in first]  # the navigation has them
    lecture = (site / "docs" / "lecture.html").read_text()
    assert lecture.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"') == 15
    assert "$$" not in lecture


def test_what_is_broken_fails_the_build(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs" / "site", tmp_path / "docs" / "site")
    pages = {
        "README.md": "# First\n\n[all](docs/index.md)\n",
        "docs/index.md": "# All\n\n## Start\n\n* [one](one.md)\n",
        "docs/one.md": "# One\n\n[a](absent.md), [b](index.md#absent-heading)\n\n$$\n\\absent{1}\n$$\n",
        "docs/lost.md": "# Lost\n",
    }
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    built = build(tmp_path, tmp_path / "built")
    assert built.returncode == 1
    for words in ("absent.md", "absent-heading", "formula: ", "lost.md: WARNING: document isn't included"):
        assert words in built.stderr


@pytest.mark.browser
def test_a_page_and_the_search_ask_for_nothing_of_the_network(site: Path, chromium: Any) -> None:
    page, asked = chromium.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{site}/index.html")
    page.wait_for_url("**/README.html")
    page.goto(f"file://{site}/search.html?q=overoptimization")
    page.wait_for_selector("ul.search li a")
    assert any("docs/overoptimization.html" in link.get_attribute("href") for link in page.query_selector_all("li a"))
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    page.close()
