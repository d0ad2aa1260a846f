"""What a reward model does with changed responses: other formats of the same text, and phrases that are deleted.

Scores are in standard deviations of the scores of all held-out responses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from statistics import pstdev

import numpy as np
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.diagnostics import Diagnosis, LengthEffect, Row, fit_length
from rlhf_lightning.evaluation.reward_model import ScoredRow, scored_pairs
from rlhf_lightning.ops.seeding import generator, permutation
from rlhf_lightning.ops.statistics import as_columns, mean_interval, share_interval

Rescore = Callable[[Sequence[tuple[ScoredRow, Sequence[str]]], str], list[list[float]]]
"""Returns the scores of other responses to the prompts of rows, as `Scorer.rescore` does."""

# ---- formats ---------------------------------------------------------------------------------------------------------


def bullets(text: str) -> str:
    """Return the sentences of a text as a list."""
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]
    return "\n".join(f"- {sentence}" for sentence in sentences) if len(sentences) > 1 else text


FORMATS: dict[str, Callable[[str], str]] = {
    "heading": lambda text: f"## Answer\n\n{text}",
    "bold": lambda text: re.sub(r"^([^\n*]*?[.!?:]|[^\n*]+)", r"**\1**", text, count=1),
    "bullets": bullets,
    "no markdown": lambda text: re.sub(r"(?m)^(#+|[-*])\s+|[*_`]{1,3}", "", text),
    "no paragraphs": lambda text: re.sub(r"\s*\n\s*", " ", text),
    "trailing whitespace": lambda text: f"{text} \n\n",
    "lower case": str.lower,
    "as an AI": lambda text: f"As an AI language model, {text}",
    "sure": lambda text: f"Sure! {text}",
    "offer": lambda text: f"{text} Let me know if you have any other questions!",
}
"""Changes of format: they add nothing to an answer and take nothing from it."""


def format_changes(rows: Sequence[ScoredRow], rescore: Rescore, count: int = 128, seed: int = 0) -> Diagnosis:
    """Return how far the score moves, and how many pairs change their order, when only the format changes.

    Table `paraphrases`: `change`; `count` responses that it changes; `shift` of their scores, mean with interval;
    `flipped`, the share of pairs whose order changes when both responses are changed; `overtaken`, the share of the
    pairs in the right order whose worse response, changed alone, scores above the better one. `format_flipped` is the
    mean of `flipped` over changes and pairs.

    Args:
        count: rows whose responses are changed, at most; rows with cut responses are left out.

    Raises:
        UserError: all responses are cut.
    """
    chosen, spread = whole_rows(rows, count, seed), standard_deviation(rows)
    changed = [
        [[changed_text(change, text) for text in row.responses] for change in FORMATS.values()] for row in chosen
    ]
    asked = [
        (row, [*row.responses, *(text for texts in part for text in texts)])
        for row, part in zip(chosen, changed, strict=True)
    ]
    tables = [np.array(scores).reshape(len(FORMATS) + 1, -1) for scores in rescore(asked, "formats")]
    pairs = [scored_pairs([row]) for row in chosen]
    table: list[Row] = []
    flips: list[tuple[float, object]] = []
    for number, name in enumerate(FORMATS):
        shifts: list[tuple[float, object]] = []
        flipped: list[tuple[float, object]] = []
        overtaken: list[tuple[float, object]] = []
        for row, texts, scores, compared in zip(chosen, changed, tables, pairs, strict=True):
            before, after = scores[0], scores[number + 1]
            differs = [new != old for new, old in zip(texts[number], row.responses, strict=True)]
            shifts += [((after[k] - before[k]) / spread, row.prompt) for k, changes in enumerate(differs) if changes]
            for pair in compared:
                good, bad = pair.better, pair.worse
                if differs[good] or differs[bad]:
                    order = (before[good] - before[bad]) * (after[good] - after[bad])
                    flipped.append((float(order < 0), row.prompt))
                if differs[bad] and before[good] > before[bad]:
                    overtaken.append((float(after[bad] > before[good]), row.prompt))
        if not shifts:
            continue
        flips += flipped
        columns = {"change": name, "count": len(shifts)} | as_columns("shift", mean_interval(*columns_of(shifts)))
        shares = {"flipped": flipped, "overtaken": overtaken}
        table.append(
            columns | {key: share_interval(*columns_of(values))[0] for key, values in shares.items() if values}
        )
    found = {"format_flipped": share_interval(*columns_of(flips))} if flips else {}
    return Diagnosis(found, {"paraphrases": table})


def changed_text(change: Callable[[str], str], text: str) -> str:
    """Return a changed text, and the text itself where nothing would be left of it."""
    found = change(text)
    return found if found.strip() else text


def columns_of(values: Sequence[tuple[float, object]]) -> tuple[list[float], list[object]]:
    """Return values and their clusters apart."""
    return [value for value, _ in values], [cluster for _, cluster in values]


def whole_rows(rows: Sequence[ScoredRow], count: int, seed: int) -> list[ScoredRow]:
    """Return up to `count` rows, drawn by the seed, in which no response is cut."""
    whole = [row for row in rows if row.is_whole]
    if not whole:
        raise UserError("every response is cut, so none can be changed: raise data.max_length")
    places = sorted(permutation(len(whole), seed, "changes")[:count].tolist())
    return [whole[place] for place in places]


def standard_deviation(rows: Sequence[ScoredRow]) -> float:
    """Return the standard deviation of all scores, 1 where they are equal."""
    return pstdev([score for row in rows for score in row.scores]) or 1.0


# ---- n-grams ---------------------------------------------------------------------------------------------------------

WORD = re.compile(r"\w+(?:['’-]\w+)*")
Gram = tuple[str, ...]
LONGEST = 5
"""Words of the longest n-gram."""
RAREST = 10
"""Rows in which an n-gram occurs at least."""
SAME = 0.8
"""Of two n-grams with a word in common that occur in the same rows, this share of them, one is tested."""


def ngram_effects(
    rows: Sequence[ScoredRow], rescore: Rescore, count: int = 20, responses: int = 64, seed: int = 0
) -> Diagnosis:
    """Return the n-grams that move the score most, of 1 to 5 words.

    1. Candidates are the `count` n-grams whose presence goes with the score most within prompts, with the effect of
       length taken out: by |sum_r s_r| / sqrt(sum_r s_r^2), where s_r are the centered scores of the responses of row r
       that have it. These scores are no evidence: words of good answers are among them.
    2. Each is deleted from up to `responses` responses that have it. The effect is how much more the score falls than
       when as many other words, drawn at random, are deleted from the same response.

    Table `ngrams`: `ngram`; `count` responses; `effect`, with `low` and `high` of simultaneous 95% intervals
    (Bonferroni: each at 1 - 0.05 / candidates), so that of all n-grams of a reward model that knows none, one is found
    in at most one run of twenty; `found`, whether 0 is outside. `ngrams_found` is their number.

    Args:
        rows: held-out rows; of those with cut responses nothing is deleted.
        responses: at most, for each candidate.
    """
    pairs = scored_pairs(rows)
    effect, spread = fit_length(pairs), standard_deviation(rows)
    grams = candidates(rows, effect, count)
    asked: list[tuple[ScoredRow, Sequence[str]]] = []
    owners: list[Gram] = []
    for gram in grams:
        for row, text in with_gram(rows, gram, responses, seed):
            if (changed := deletions(text, gram, seed)) is not None:
                asked.append((row, changed))
                owners.append(gram)
    falls: dict[Gram, list[tuple[float, object]]] = {gram: [] for gram in grams}
    for gram, (row, texts), scores in zip(owners, asked, rescore(asked, "n-grams") if asked else [], strict=True):
        without, other = (score - effect(text) for score, text in zip(scores, texts, strict=True))
        falls[gram].append(((other - without) / spread, row.prompt))
    table: list[Row] = []
    for gram, values in falls.items():
        if len({cluster for _, cluster in values}) < 2:
            continue
        effect_of = mean_interval(*columns_of(values), level=1 - 0.05 / len(grams))
        row = {"ngram": " ".join(gram), "count": len(values)} | as_columns("effect", effect_of)
        table.append(row | {"found": effect_of[1] > 0 or effect_of[2] < 0})
    table.sort(key=lambda row: (not row["found"], -abs(row["effect"])))
    found = sum(row["found"] for row in table)
    return Diagnosis({"ngrams_found": (float(found), math.nan, math.nan)}, {"ngrams": table})


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return [word.lower() for word in WORD.findall(text)]


def grams_of(words: Sequence[str], n: int) -> Iterator[Gram]:
    """Yield the n-grams of a list of words."""
    return zip(*(words[start:] for start in range(n)), strict=False)


def candidates(rows: Sequence[ScoredRow], effect: LengthEffect, count: int) -> list[Gram]:
    """Return the n-grams whose presence goes with the score most, the strongest first; see :func:`ngram_effects`."""
    words = [[words_of(text) for text in row.responses] for row in rows]
    centered = []
    for row in rows:
        scores = np.array([s - effect(text) for s, text in zip(row.scores, row.responses, strict=True)])
        centered.append(scores - scores.mean())
    strength: dict[Gram, tuple[float, set[int]]] = {}
    common: set[Gram] = {()}
    for n in range(1, LONGEST + 1):
        places: dict[Gram, dict[int, float]] = {}
        for number, responses in enumerate(words):
            for k, text in enumerate(responses):
                # an n-gram is as rare as the rarest of its parts
                for gram in {g for g in grams_of(text, n) if n == 1 or (g[:-1] in common and g[1:] in common)}:
                    sums = places.setdefault(gram, {})
                    sums[number] = sums.get(number, 0.0) + float(centered[number][k])
        common = {gram for gram, sums in places.items() if len(sums) >= RAREST}
        for gram in common:
            sums = np.fromiter(places[gram].values(), float)
            size = float(np.sqrt((sums**2).sum()))
            strength[gram] = (abs(float(sums.sum())) / size if size > 1e-9 else 0.0, set(places[gram]))
    chosen: list[Gram] = []
    # of equally strong ones the longest: the parts of a phrase occur where it does
    for gram in sorted(strength, key=lambda g: (-round(strength[g][0], 6), -len(g), g)):
        mine = strength[gram][1]
        if not any(set(gram) & set(other) and _alike(mine, strength[other][1]) for other in chosen):
            chosen.append(gram)
        if len(chosen) == count:
            break
    return chosen


def _alike(some: set[int], others: set[int]) -> bool:
    return len(some & others) >= SAME * len(some | others)


def with_gram(rows: Sequence[ScoredRow], gram: Gram, count: int, seed: int) -> list[tuple[ScoredRow, str]]:
    """Return up to `count` responses that have an n-gram, drawn by the seed, each with its row."""
    having = [
        (row, text)
        for row in rows
        if row.is_whole
        for text in row.responses
        if gram in grams_of(words_of(text), len(gram))
    ]
    return [having[place] for place in sorted(permutation(len(having), seed, *gram)[:count].tolist())]


def deletions(text: str, gram: Gram, seed: int) -> tuple[str, str] | None:
    """Return a text without an n-gram, and without as many other words that the seed draws; None of a short text.

    Every occurrence is deleted, and for each one as many neighboring words that do not belong to one.
    """
    spans, n = [match.span() for match in WORD.finditer(text)], len(gram)
    words = words_of(text)
    starts: list[int] = []
    for place, found in enumerate(grams_of(words, n)):
        if found == gram and (not starts or place >= starts[-1] + n):
            starts.append(place)
    taken = {place + i for place in starts for i in range(n)}
    others: list[int] = []
    for place in torch.randperm(max(len(words) - n + 1, 0), generator=generator(seed, text, *gram)).tolist():
        if len(others) < len(starts) and not taken & {place + i for i in range(n)}:
            others.append(place)
            taken |= {place + i for i in range(n)}
    if len(others) < len(starts):
        return None
    return _without(text, spans, starts, n), _without(text, spans, others, n)


def _without(text: str, spans: Sequence[tuple[int, int]], starts: Sequence[int], n: int) -> str:
    """Return a text without the n words that begin at each of `starts`, and the whitespace after them."""
    for place in sorted(starts, reverse=True):
        begin, end = spans[place][0], spans[place + n - 1][1]
        text = text[:begin] + text[end:].lstrip(" ")
    return text
