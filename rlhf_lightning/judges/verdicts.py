"""Reading what a judge wrote. Only a verdict that is written as one counts; anything else is a recorded failure."""

from __future__ import annotations

import re

from rlhf_lightning.judges.judge import REFUSAL, UNREADABLE

MARKED = re.compile(r"\[\[\s*(.{1,200}?)\s*\]\]", re.DOTALL)
"""A marked verdict. The last one counts: reasons may quote others, of a response too."""
NAMED = r"(?:(?:the\s+)?(?:response|answer|option|assistant)\s+)?"
SIDE = {"a": 1.0, "b": 0.0, "c": 0.5, "tie": 0.5}
REFUSES = re.compile(
    r"^\W*(?:i'?m (?:really |very |so )?sorry|sorry\b|i apologi[sz]e|as an ai\b|"
    r"i'm (?:unable|not able|not comfortable)|i (?:cannot|can'?t|can not|won'?t|will not)|"
    r"i (?:am unable|am not able|must decline|decline))",
    re.IGNORECASE,
)
TextVerdict = tuple[float | tuple[int, ...] | None, str | None]
"""The value that was read, or None and why there is none: `REFUSAL` or `UNREADABLE`."""


def read_pair(text: str) -> TextVerdict:
    """Return 1.0 where the response shown first is better, 0.0 where the second, 0.5 for a tie."""
    for marked in reversed(MARKED.findall(text)):
        if found := re.fullmatch(rf"{NAMED}(a|b|c|tie)", marked, re.IGNORECASE):
            return SIDE[found[1].lower()], None
    found = _bare(text, r"[ABC]|(?i:tie)")
    if found is None and (named := re.findall(r"\bresponse ([ab]) is (?:the )?better\b", text, re.IGNORECASE)):
        found = named[-1] if len({side.lower() for side in named}) == 1 else None
    return (SIDE[found.lower()], None) if found else _failed(text)


def read_rating(text: str, scale: int) -> TextVerdict:
    """Return a rating from 1 to `scale`, of which "4/5" is 4 when the scale is 5."""
    number = rf"(\d+(?:\.\d+)?)(?:\s*/\s*{scale})?"
    for marked in reversed(MARKED.findall(text)):
        if (found := re.fullmatch(number, marked)) and 1 <= float(found[1]) <= scale:
            return float(found[1]), None
    found = _bare(text, number)
    value = float(found.partition("/")[0]) if found else 0.0
    return (value, None) if 1 <= value <= scale else _failed(text)


def read_ranking(text: str, letters: str) -> TextVerdict:
    """Return the rank of each response of `letters`, 0 the best, from an order such as "B > A = C"."""
    for marked in [*reversed(MARKED.findall(text)), *reversed(text.strip().splitlines())]:
        levels = [[name.strip().upper() for name in level.split("=")] for level in marked.strip().split(">")]
        named = [re.sub(r"^RESPONSE\s+", "", name) for level in levels for name in level]
        if sorted(named) == sorted(letters):
            rank = {re.sub(r"^RESPONSE\s+", "", name): i for i, level in enumerate(levels) for name in level}
            return tuple(rank[letter] for letter in letters), None
    return _failed(text)


def _bare(text: str, verdict: str) -> str | None:
    """Return a verdict that is all of an answer or its last line, or an answer's beginning before punctuation.

    "A good answer ..." begins with no verdict.
    """
    lines = text.strip().splitlines() or [""]
    lead = rf"[\W_]*(?:(?:final\s+)?(?:verdict|answer|rating|score)\s*(?:is|:)\s*[\W_]*)?{NAMED}"
    for line in (text.strip(), lines[-1]):
        if found := re.fullmatch(rf"(?i:{lead})({verdict})[\W_]*", line):
            return found[1]
    found = re.match(rf"\W*(?i:{NAMED})([ABC])\s*(?:[.:;)*]|,\s|$)", lines[0])
    return found[1] if found and re.fullmatch(verdict, found[1]) else None


def _failed(text: str) -> TextVerdict:
    return None, REFUSAL if REFUSES.match(text.strip().replace("’", "'")) else UNREADABLE
