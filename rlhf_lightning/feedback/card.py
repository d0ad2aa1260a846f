"""Data cards in Markdown, and the texts of others in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def data_card(facts: Iterable[tuple[str, Any]], sections: Mapping[str, Sequence[str]], head: Sequence[str] = ()) -> str:
    """Return a data card: a list of facts, then sections with lines of Markdown; one without lines says "Nothing.".

    Args:
        facts: names and values; they are texts, not Markdown.
        head: lines of YAML for the hub.
    """
    lines = ["---", *head, "---", ""] if head else []
    lines += ["# Data card", "", *bullets(facts)]
    for title, content in sections.items():
        lines += ["", f"## {title}", "", *(content or ["Nothing."])]
    return "\n".join(lines) + "\n"


def bullets(facts: Iterable[tuple[str, Any]]) -> list[str]:
    """Return lines of a list: a name and a value each."""
    return [f"* {in_markdown(name)}: {in_markdown(value)}" for name, value in facts]


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return the lines of a table of texts."""
    lines = [columns, ["---"] * len(columns), *([in_markdown(value) for value in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def fenced(text: str, language: str) -> list[str]:
    """Return a text as a code block that nothing in it ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{fence}{language}", text.rstrip(), fence]


def in_markdown(text: Any) -> str:
    """Return a text of others on one line of Markdown, without what would be markup, a link or a cell's end."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    line = " ".join(line.split())
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|!" else c for c in line)
