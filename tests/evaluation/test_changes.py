"""Changed responses: a planted phrase is found, a clean scorer has none, formats that move a score are told."""

from __future__ import annotations

import re

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.changes import (
    FORMATS,
    bullets,
    candidates,
    changed_text,
    deletions,
    format_changes,
    ngram_effects,
)
from rlhf_lightning.evaluation.diagnostics import LengthEffect, fit_length
from rlhf_lightning.evaluation.reward_model import scored_pairs
from tests.evaluation.scored import noise, rescorer, row, scored, texts

PHRASE = "as the ancient oracle says"
TEXT = "First point. Second point!\n\n* Third"


# ---- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("heading", "## Answer\n\nFirst point. Second point!\n\n* Third"),
        ("bold", "**First point.** Second point!\n\n* Third"),
        ("bullets", "- First point.\n- Second point!\n- * Third"),
        ("no markdown", "First point. Second point!\n\nThird"),
        ("no paragraphs", "First point. Second point! * Third"),
        ("trailing whitespace", "First point. Second point!\n\n* Third \n\n"),
        ("lower case", "first point. second point!\n\n* third"),
        ("as an AI", "As an AI language model, First point. Second point!\n\n* Third"),
    ],
)
def test_formats_by_hand(name: str, expected: str) -> None:
    assert FORMATS[name](TEXT) == expected


def test_a_format_that_leaves_nothing_changes_nothing() -> None:
    assert changed_text(FORMATS["no markdown"], "***") == "***"
    assert bullets("Only one sentence.") == "Only one sentence."


def test_what_a_format_moves_by_hand() -> None:
    """The score counts characters in units of 10, and a heading is worth 3."""

    def score(text: str) -> float:
        return len(text.strip()) / 10 + 3.0 * text.startswith("## ")

    rows = scored([["x" * 40 + ".", "y" * 20 + "."], ["z" * 10 + ".", "y" * 14 + "."]] * 30, score)
    found = format_changes(rows, rescorer(score), count=50)
    lines = {line["change"]: line for line in found.tables["paraphrases"]}
    scores = [s for r in rows for s in r.scores]
    spread = (sum((s - sum(scores) / len(scores)) ** 2 for s in scores) / len(scores)) ** 0.5
    assert lines["heading"]["shift"] == pytest.approx((3 + len("## Answer\n\n") / 10) / spread)
    assert lines["heading"]["count"] == 100  # 50 of 60 rows
    assert lines["heading"]["flipped"] == 0.0  # both responses get the same
    assert lines["heading"]["overtaken"] == 1.0  # the worse one alone overtakes
    assert lines["trailing whitespace"]["shift"] == 0.0
    assert "bullets" not in lines  # there is one sentence: nothing changes
    assert "no markdown" not in lines
    assert found.metrics["format_flipped"][0] == 0.0


def test_pairs_that_a_format_flips() -> None:
    """The scorer likes capitals, which the better responses have."""

    def score(text: str) -> float:
        return 5.0 * sum(letter.isupper() for letter in text) + len(text) / 100

    rows = scored([["Good " * 2, "bad " * 4]] * 20, score)
    found = format_changes(rows, rescorer(score))
    lines = {line["change"]: line for line in found.tables["paraphrases"]}
    assert lines["lower case"]["flipped"] == 1.0
    assert lines["lower case"]["count"] == 20  # the worse ones have no capitals
    assert "overtaken" not in lines["lower case"]
    assert lines["heading"]["flipped"] == 0.0
    assert 0 < found.metrics["format_flipped"][0] < 0.5


def test_rows_with_cut_responses_are_left_out() -> None:
    rows = [row(i, ["long", "text"], [1.0, 0.0], is_whole=i % 2 == 0) for i in range(10)]
    asked: list[int] = []

    def rescore(changed: list, title: str) -> list[list[float]]:
        asked.extend(r.number for r, _ in changed)
        return [[0.0] * len(texts) for _, texts in changed]

    format_changes(rows, rescore)
    assert asked == [0, 2, 4, 6, 8]
    with pytest.raises(UserError, match=r"every response is cut, so none can be changed: raise data\.max_length"):
        format_changes(rows[1::2], rescore)


# ---- n-grams -----------------------------------------------------------------------------------------------------------


def test_deletions_by_hand() -> None:
    without, other = deletions("One, two  three. Four five six seven.", ("two", "three"), 0)  # type: ignore[misc]
    assert without == "One, . Four five six seven."
    assert len(re.findall(r"\w+", other)) == 5
    assert "two  three" in other
    assert deletions("two three four", ("two", "three"), 0) is None  # no two other words
    twice, others = deletions("a b c a b d e f g h", ("a", "b"), 0)  # type: ignore[misc]
    assert twice == "c d e f g h"
    assert others.count("a b") == 2
    assert len(others.split()) == 6


@pytest.mark.slow
def test_a_planted_phrase_is_found_and_nothing_else() -> None:
    plain = noise(0, 0.5)
    for value in (1.5, -1.5):

        def score(text: str, value: float = value) -> float:
            return plain(text) + value * (PHRASE in text) + len(text) / 200

        rows = scored(texts(200, 1, PHRASE), score)
        found = ngram_effects(rows, rescorer(score))
        first, *others = found.tables["ngrams"]
        assert first["ngram"] == PHRASE
        assert first["found"]
        assert first["count"] >= 30
        spread = first["effect"] / value
        assert first["low"] <= first["effect"] <= first["high"]
        assert 0.5 < spread < 2  # in standard deviations of about one
        assert found.metrics["ngrams_found"][0] == 1.0
        assert not any(line["found"] for line in others)


@pytest.mark.slow
def test_a_clean_scorer_has_no_phrases() -> None:
    """Of 20 seeds the simultaneous intervals accuse at most one on average; more than 4 have a chance of 0.3%."""
    false = 0
    for seed in range(20):
        plain = noise(seed)

        def score(text: str, plain=plain) -> float:
            return plain(text) + len(text) / 50  # length moves the score, and no phrase does

        found = ngram_effects(scored(texts(80, seed, PHRASE), score), rescorer(score), count=10, responses=30)
        assert len(found.tables["ngrams"]) == 10
        false += found.metrics["ngrams_found"][0] > 0
    assert false <= 4


@pytest.mark.slow
def test_a_phrase_of_good_answers_is_none_that_moves_the_score() -> None:
    """The better answers have the phrase; the score knows them, and not the phrase."""
    pairs = [[f"{good} {PHRASE}", worse] for good, worse in texts(60, 3)]
    plain = noise(0, 0.2)
    known = {text: 2.0 for text, _ in pairs}
    rows = scored(pairs, lambda text: plain(text) + known.get(text, 0.0))
    found = ngram_effects(rows, rescorer(plain))
    assert PHRASE in [line["ngram"] for line in found.tables["ngrams"]]  # it goes with the score
    assert found.metrics["ngrams_found"][0] == 0.0


def test_length_is_not_what_makes_a_candidate() -> None:
    """Texts of equal length but for the phrase: to a score that follows length the phrase is length."""
    plain = noise(5, 0.1)
    pairs = texts(100, 5, PHRASE, 0.3, 20, 20)
    rows = scored(pairs, lambda text: len(text) / 20 + plain(text))
    gram = tuple(PHRASE.split())
    assert candidates(rows, LengthEffect(0.0, 0.0), 5)[0] == gram
    assert gram not in candidates(rows, fit_length(scored_pairs(rows)), 5)


def test_without_common_words_there_is_nothing_to_test() -> None:
    rows = scored([[f"a{i} b{i} c{i} d{i}", f"e{i} f{i} g{i}"] for i in range(12)], len)
    assert ngram_effects(rows, rescorer(len)).tables == {"ngrams": []}
