"""Rows of the world in the layouts the data modules read, each a function of (seed, kind, split, number)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.world.gold import gold
from rlhf_lightning.world.labeller import Labeller, group_of
from rlhf_lightning.world.prompts import FLAWS, Prompt, candidates, declared, flawed, prompts

KINDS = ("corpus", "demonstrations", "preferences", "rankings", "prompts")


def rows(
    kind: str,
    n: int,
    seed: int = 0,
    split: str = "train",
    quality: float = 0.5,
    labeller: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield `n` rows.

    Args:
        kind: corpus (`text`), demonstrations (`messages`), preferences (`prompt`, `chosen`, `rejected`), rankings
            (`prompt`, `responses`, `ranking`), both with `annotator` and `group`, or prompts (`prompt` and what the
            gold reward needs).
        seed, split: with the row's number they decide a row. Prompts of "val" never occur in "train".
        quality: share of ideal demonstrations; the others have one flaw.
        labeller: arguments of :class:`Labeller`; held-out preferences are labelled by the same groups without noise or
            bias.

    Raises:
        UserError: an unknown kind, a quality outside [0, 1], a labeller option that does not exist or cannot be.
    """
    if kind not in KINDS:
        near = nearest(kind, KINDS)
        raise UserError(f"data.world.records={kind!r} is not one of {', '.join(KINDS)}.{near}")
    if not 0 <= quality <= 1:
        raise UserError(f"data.world.quality={quality} is not a share between 0 and 1")
    try:
        person = Labeller(**(labeller or {}))
        person = Labeller(group=person.group) if split == "val" else person
    except TypeError as error:
        raise UserError(f"data.world.labeller: {error}") from error
    make = {
        "corpus": lambda rng, i: {"text": _corpus(rng)},
        "demonstrations": lambda rng, i: _demonstration(_pick(rng, split), rng, quality, i),
        "preferences": lambda rng, i: _preference(_pick(rng, split), rng, person, i),
        "rankings": lambda rng, i: _ranking(_pick(rng, split), rng, person, i),
        "prompts": lambda rng, i: _pick(rng, split).row(i),
    }[kind]
    for number in range(n):
        yield make(random.Random(f"{seed}:{kind}:{split}:{number}"), number)


def _pick(rng: random.Random, split: str) -> Prompt:
    families = declared()["families"]
    (family,) = rng.choices(list(families), list(families.values()))
    return rng.choice(prompts(family, split))


def _corpus(rng: random.Random) -> str:
    """Return a few true sentences and some filler, not a conversation."""
    sentences = []
    for _ in range(rng.randint(3, 5)):
        prompt = _pick(rng, "train")
        if prompt.family in ("harmful", "belief"):
            sentences.append(rng.choice(declared()["filler"]))
        else:
            sentences.append(prompt.ideal if prompt.ideal.endswith(".") else f"Here are some names: {prompt.ideal}.")
    return " ".join(sentences)


def _demonstration(prompt: Prompt, rng: random.Random, quality: float, number: int) -> dict[str, Any]:
    response = prompt.ideal
    if rng.random() >= quality:
        # half of the flaws are padding, the rest is what the family can get wrong
        kinds = ["padded"] * 2 + [k for k in FLAWS if k != "padded"]
        options = [text for kind in kinds if (text := flawed(prompt, kind, rng)) is not None]
        response = rng.choice(options)
    messages = [{"role": "user", "content": prompt.question}, {"role": "assistant", "content": response}]
    return {"messages": messages, "family": prompt.family, "id": f"world-{prompt.family}-{number}"}


def _preference(prompt: Prompt, rng: random.Random, person: Labeller, number: int) -> dict[str, Any]:
    row = prompt.row(number)
    options = candidates(prompt, rng)
    first = options["ideal"] if rng.random() < 0.6 else rng.choice(list(options.values()))
    second = rng.choice([text for text in options.values() if gold(row, text).total != gold(row, first).total])
    annotator = person.annotator(rng)
    chosen, rejected = (first, second) if person.prefers_first(row, first, second, annotator, rng) else (second, first)
    return {
        "prompt": prompt.question,
        "chosen": chosen,
        "rejected": rejected,
        "annotator": annotator,
        "group": group_of(annotator),
        "family": prompt.family,
        "id": row["id"],
        "gold_chosen": gold(row, chosen).total,
        "gold_rejected": gold(row, rejected).total,
    }


def _ranking(prompt: Prompt, rng: random.Random, person: Labeller, number: int) -> dict[str, Any]:
    row = prompt.row(number)
    responses = list(candidates(prompt, rng).values())
    rng.shuffle(responses)
    annotator = person.annotator(rng)
    values = [round(person.value(row, text, annotator) + rng.gauss(0, person.noise), 6) for text in responses]
    levels = sorted(set(values), reverse=True)
    if len(levels) == 1:  # a ranking needs two levels
        levels, values = [1.0, 0.0], [1.0, *[0.0] * (len(values) - 1)]
    return {
        "prompt": prompt.question,
        "responses": responses,
        "ranking": [levels.index(value) for value in values],
        "annotator": annotator,
        "group": group_of(annotator),
        "family": prompt.family,
        "id": row["id"],
    }
