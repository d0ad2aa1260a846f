"""The documentation site: `make docs` reads README.md, docs/*.md and the pages beside the README as GitHub does."""

from __future__ import annotations

import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)
ROOT = Path(__file__).parents[2]
CONTENTS = "docs/index"

project = "rlhf_lightning"
html_title = "rlhf_lightning"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md"]
exclude_patterns = [f"{path.name}/**" for path in ROOT.iterdir() if path.is_dir() and path.name != "docs"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_additional_pages = {"index": "redirect.html"}
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_copy_source = False
html_math_renderer = "mathml"
templates_path = ["."]


def navigation() -> str:
    """Return the sidebar: for every heading of docs/index.md the pages that it links."""
    sections = re.split(r"^## ", (ROOT / f"{CONTENTS}.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    lines = []
    for section in sections:
        pages = [f"/docs/{page}".replace("/docs/../", "/") for page in re.findall(r"\]\(([\w./]+)\.md\)", section)]
        lines += ["```{toctree}", ":hidden:", f":caption: {section.splitlines()[0]}", *dict.fromkeys(pages), "```"]
    return "\n".join(["", f"```{{toctree}}\n:hidden:\n/{CONTENTS}\n```", *lines])


def add_navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """Append the sidebar to the first page."""
    if name == root_doc:
        source[0] += navigation()


def visit_math(self: HTML5Translator, node: nodes.Element) -> None:
    """Write a formula as MathML, which browsers draw themselves: no script and no font."""
    block = isinstance(node, nodes.math_block)
    try:
        formula = tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        logger.warning("formula: %s", error, location=node)
        raise nodes.SkipNode from error
    self.body.append(f'<div class="table-wrapper container">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register the sidebar and the renderer of formulas."""
    app.connect("source-read", add_navigation)
    app.add_html_math_renderer("mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math, None))
