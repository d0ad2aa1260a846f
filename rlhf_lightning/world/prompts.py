"""Prompts of the world and, for each, the ideal response and every kind of flawed one."""

from __future__ import annotations

import itertools
import random
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def declared() -> dict[str, Any]:
    """Return the world's data, `world.yaml`."""
    return yaml.safe_load(Path(__file__).with_name("world.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Prompt:
    """A question with what the gold reward needs to know about it.

    Args:
        family: fact, belief, arithmetic, list, open, harmful or lookalike.
        question: the user's text.
        ideal: the best response.
        answer: the words that make a response correct.
        others: words that make it wrong; for family harmful the act, which no refusal has to speak of.
        claim: what the user believes, for family belief; equal to `answer` when the belief is true.
        count: number of items asked for, for family list.
    """

    family: str
    question: str
    ideal: str
    answer: str = ""
    others: tuple[str, ...] = field(default=())
    claim: str = ""
    count: int = 0

    def row(self, number: int) -> dict[str, Any]:
        """Return the prompt as a row whose columns the gold reward reads."""
        columns = asdict(self) | {"others": list(self.others), "id": f"world-{self.family}-{number}"}
        return {"prompt": columns.pop("question"), **columns}


@cache
def prompts(family: str, split: str) -> tuple[Prompt, ...]:
    """Return every prompt of `family` in `split`; one phrasing in five of each subject is held out for "val"."""
    selected = []
    for subject, prompt in _all(family):
        # by question: nearly every subject and every phrasing is seen in training, but not every pair of them
        held_out = random.Random(f"{family}:{subject}:{prompt.question}").random() < 0.2
        if held_out == (split == "val"):
            selected.append(prompt)
    return tuple(selected)


def _all(family: str) -> list[tuple[str, Prompt]]:
    return {
        "fact": _facts,
        "belief": _beliefs,
        "arithmetic": _arithmetic,
        "list": _lists,
        "open": _open,
        "harmful": _harmful,
        "lookalike": _lookalikes,
    }[family]()


def _facts() -> list[tuple[str, Prompt]]:
    pairs = []
    for fact in declared()["facts"]:
        values = fact["values"]
        for subject, value in values.items():
            ideal = fact["statement"].format(subject=subject, value=value)
            others = tuple(sorted(set(values.values()) - {value}))
            for question in fact["questions"]:
                pairs.append((subject, Prompt("fact", question.format(subject=subject), ideal, value, others)))
    return pairs


def _beliefs() -> list[tuple[str, Prompt]]:
    pairs = []
    for fact in declared()["facts"]:
        values = fact["values"]
        for subject, value in values.items():
            others = tuple(sorted(set(values.values()) - {value}))
            statement = fact["statement"].format(subject=subject, value=value)
            statement = statement[0].lower() + statement[1:]
            wrong = random.Random(f"claims of {subject}").sample(others, 3)
            for claim, question in itertools.product([*wrong, value], fact["beliefs"]):
                ideal = f"{'Yes' if claim == value else 'No'}, {statement}"
                text = question.format(subject=subject, claim=claim)
                pairs.append((subject, Prompt("belief", text, ideal, value, others, claim=claim)))
    return pairs


def _arithmetic() -> list[tuple[str, Prompt]]:
    data, pairs = declared()["arithmetic"], []
    numbers = range(data["largest"] + 1)
    for a, b in itertools.product(numbers, numbers):
        ideal = data["statement"].format(a=a, b=b, value=a + b)
        for question in data["questions"]:
            pairs.append((f"{a}+{b}", Prompt("arithmetic", question.format(a=a, b=b), ideal, str(a + b))))
    return pairs


def _lists() -> list[tuple[str, Prompt]]:
    data, pairs = declared()["lists"], []
    for (word, count), (category, members) in itertools.product(data["numbers"].items(), data["categories"].items()):
        ideal = ", ".join(members[:count])
        others = tuple(m for c, names in data["categories"].items() if c != category for m in names)
        for question in data["questions"]:
            text = question.format(number=word, category=category)
            pairs.append((f"{word} {category}", Prompt("list", text, ideal, ",".join(members), others, count=count)))
    return pairs


def _open() -> list[tuple[str, Prompt]]:
    data = declared()["open"]
    return [
        (
            subject,
            Prompt(
                "open",
                q.format(subject=subject),
                data["statement"].format(subject=subject, value=value),
                value,
            ),
        )
        for subject, value in data["values"].items()
        for q in data["questions"]
    ]


def _harmful() -> list[tuple[str, Prompt]]:
    data = declared()["harmful"]
    refusal = declared()["refusals"][0]
    return [
        (act, Prompt("harmful", q.format(act=act), refusal, others=(act,)))
        for act in data["acts"]
        for q in data["questions"]
    ]


def _lookalikes() -> list[tuple[str, Prompt]]:
    data = declared()["lookalike"]
    return [
        (act, Prompt("lookalike", q.format(act=act), data["statement"].format(act=act, value=value), value))
        for act, value in data["values"].items()
        for q in data["questions"]
    ]


def flawed(prompt: Prompt, kind: str, rng: random.Random) -> str | None:
    """Return a response with one flaw, or None where the flaw does not apply to this family.

    Kinds: padded, refusing (over-refusal), wrong, flattering, complying, short (a list with an item missing).
    """
    if kind == "padded":
        filler = declared()["filler"]
        sentences = rng.sample(filler, rng.choice([1, 2, 2, 3]))
        before = rng.random() < 0.3
        return " ".join([sentences[0], prompt.ideal, *sentences[1:]] if before else [prompt.ideal, *sentences])
    if kind == "refusing":
        return None if prompt.family == "harmful" else rng.choice(declared()["refusals"])
    if kind == "flattering":
        if prompt.family != "belief" or prompt.claim == prompt.answer:
            return None
        statement = prompt.ideal.removeprefix("No, ").replace(prompt.answer, prompt.claim)
        return f"Yes, {statement}" if rng.random() < 0.5 else f"You are right, {statement}"
    if kind == "complying":
        if prompt.family != "harmful":
            return None
        act = next(act for act in declared()["harmful"]["acts"] if act in prompt.question)
        return declared()["harmful"]["comply"].format(act=act)
    return _wrong(prompt, rng) if kind == "wrong" else _short(prompt) if kind == "short" else None


def _wrong(prompt: Prompt, rng: random.Random) -> str | None:
    if prompt.family == "fact":
        return prompt.ideal.replace(prompt.answer, rng.choice(prompt.others))
    if prompt.family == "arithmetic":
        value = rng.choice([v for v in range(19) if v != int(prompt.answer)])
        return prompt.ideal.rsplit(" ", 1)[0] + f" {value}."
    if prompt.family in ("open", "lookalike"):
        values = [v for v in declared()[prompt.family]["values"].values() if v != prompt.answer]
        return prompt.ideal.replace(prompt.answer, rng.choice(values))
    return None


def _short(prompt: Prompt) -> str | None:
    return ", ".join(prompt.answer.split(",")[: prompt.count - 1]) if prompt.family == "list" else None


FLAWS = ("padded", "refusing", "wrong", "flattering", "complying", "short")


def candidates(prompt: Prompt, rng: random.Random) -> dict[str, str]:
    """Return the ideal response and one response of every flaw that applies."""
    responses = {"ideal": prompt.ideal}
    for kind in FLAWS:
        text = flawed(prompt, kind, rng)
        if text is not None:
            responses[kind] = text
    return responses
