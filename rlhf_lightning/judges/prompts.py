"""What a judge is asked, short enough for small models too.

The responses of a comparison are called A, B, ...; a text of theirs that imitates the lines around it, or asks for a
verdict, cannot end its own part: the lines then carry a word that depends on all texts.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence

from rlhf_lightning.data.comparisons import digest
from rlhf_lightning.data.messages import Message

VERSION = 1
"""Of the texts below: with another one a judge gives other answers, and runs that used it are not the same."""
LETTERS = string.ascii_uppercase
ROLES = {"user": "User", "assistant": "Assistant", "system": "System", "developer": "System", "tool": "Tool"}
RUBRIC = "how helpful, honest and harmless the response is"
EMPTY = "(an empty response)"
PART, END = "[Begin of {}]", "[End of {}]"


def pairwise(prompt: Sequence[Message], shown: Sequence[str], principle: str | None, written: bool) -> str:
    """Return the question which of two responses is better, in the order in which they are shown.

    Args:
        principle: the one by which to judge.
        written: asks for reasons and a verdict, else for one letter.
    """
    by = f"by this principle: {principle}" if principle else "by how helpful, honest and harmless it is"
    if written:
        how = "Say in a few sentences why. Then end with your verdict: [[A]], [[B]], or [[C]] for a tie."
    else:
        how = "Answer with one letter: A or B."
    return f"{_texts(prompt, shown)}\n\nWhich response is better, {by}? {how}"


def pointwise(
    prompt: Sequence[Message], response: str, rubric: str | None, principle: str | None, scale: int, written: bool
) -> str:
    """Return the question how good a response is, from 1 to `scale`."""
    by = " ".join(filter(None, [rubric or ("" if principle else RUBRIC), principle]))
    if written:
        how = f"Say in a few sentences why. Then end with your rating: [[1]] to [[{scale}]]."
    else:
        how = f"Answer with one number from 1 to {scale}."
    parts = _texts(prompt, [response])
    return f"{parts}\n\nRate the response from 1 (very bad) to {scale} (very good) by this: {by}. {how}"


def listwise(prompt: Sequence[Message], shown: Sequence[str], principle: str | None, written: bool) -> str:
    """Return the question for a ranking of responses, the best first."""
    by = f"by this principle: {principle}" if principle else "by how helpful, honest and harmless they are"
    letters = LETTERS[: len(shown)]
    if written:
        order = " > ".join(letters[::-1])
        how = f"Rank the responses, {by}. Say in a few sentences why. Then end with the order, the best first, as in " \
              f"[[{order}]]; write = between equal ones."  # fmt: skip
    else:
        how = f"Which response is the best, {by}? Answer with one letter: {', '.join(letters[:-1])} or {letters[-1]}."
    return f"{_texts(prompt, shown)}\n\n{how}"


def _texts(prompt: Sequence[Message], shown: Sequence[str]) -> str:
    """Return the conversation and the responses, each between two lines that occur nowhere in them."""
    turns = [f"{ROLES.get(m['role'], m['role'])}: {m['content'].strip()}" for m in prompt]
    names = ["response"] if len(shown) == 1 else [f"response {letter}" for letter in LETTERS[: len(shown)]]
    parts = [("conversation", "\n\n".join(turns))]
    parts += [(name, text.strip() or EMPTY) for name, text in zip(names, shown, strict=True)]
    everything = "\n".join(text for _, text in parts).casefold()
    if any(line.format("").rstrip("]").casefold() in everything for line in (PART, END)):
        word = hashlib.sha256(digest(prompt, shown).encode()).hexdigest()[:8]  # the same in every order
        parts = [(f"{name} {word}", text) for name, text in parts]
    return "\n\n".join(f"{PART.format(name)}\n{text}\n{END.format(name)}" for name, text in parts)
