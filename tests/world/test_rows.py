"""Rows are a function of (seed, kind, split, number), in layouts the data layer reads, with held-out prompts unseen."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest

from rlhf_lightning.data.records import demonstration, preference, prompt
from rlhf_lightning.errors import UserError
from rlhf_lightning.world import KINDS, gold, rows
from rlhf_lightning.world.gold import WORD
from rlhf_lightning.world.prompts import declared, prompts

FAMILIES = list(declared()["families"])


def sample(kind: str, n: int, **options: Any) -> list[dict[str, Any]]:
    return list(rows(kind, n, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_deterministic(kind: str) -> None:
    first = sample(kind, 40, seed=3)
    assert len(first) == 40
    assert sample(kind, 40, seed=3) == first
    assert sample(kind, 15, seed=3) == first[:15]  # a row does not depend on how many are asked for
    assert sample(kind, 40, seed=4) != first
    assert json.loads(json.dumps(first)) == first  # plain values, so rows survive a file
    if kind != "corpus":
        assert sample(kind, 40, seed=3, split="val") != first


def test_rows_do_not_change_between_versions() -> None:
    """A change here changes every result: raise world.VERSION with it."""
    (row,) = rows("prompts", 1, seed=0, split="val")
    assert (row["id"], row["prompt"]) == ("world-fact-0", "Please name the capital of France.")
    assert row["ideal"] == "The capital of France is Paris."


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_prompts_are_new_but_their_parts_are_known(family: str) -> None:
    train, val = prompts(family, "train"), prompts(family, "val")
    asked = [" ".join(p.question.lower().split()) for p in (*train, *val)]
    assert len(set(asked)) == len(asked)  # no prompt twice, so none in both splits
    assert 0.1 < len(val) / len(asked) < 0.4
    assert len(val) >= 5
    known = {p.ideal for p in train}
    assert sum(p.ideal in known for p in val) >= 0.95 * len(val)  # the answer is seen in other phrasings
    words = {word for p in train for word in WORD.findall(p.question)}
    assert all(word in words for p in val for word in WORD.findall(p.question))


@pytest.mark.slow
def test_splits_of_every_kind_are_disjoint() -> None:
    def asked(kind: str, split: str) -> set[str]:
        return {
            row["messages"][0]["content"] if kind == "demonstrations" else row["prompt"]
            for row in rows(kind, 800, split=split)
        }

    train = set.union(*(asked(kind, "train") for kind in KINDS if kind != "corpus"))
    val = set.union(*(asked(kind, "val") for kind in KINDS if kind != "corpus"))
    assert len(train) > 900
    assert len(val) > 250
    assert not train & val


def test_every_row_reads_as_a_record() -> None:
    for row in rows("demonstrations", 200):
        assert demonstration(row).content == row["messages"]
    for kind in ("preferences", "rankings"):
        for row in rows(kind, 200):
            record = preference(row)
            assert row["annotator"]
            best = row["chosen"] if kind == "preferences" else row["responses"][row["ranking"].index(0)]
            assert record.responses[0] == best
            assert len(record.ranks) == len(record.responses) >= 2
            assert min(record.ranks) == 0 < max(record.ranks)
    for row in rows("prompts", 200):
        assert prompt(row).metadata["ideal"] == row["ideal"]
    for row in rows("corpus", 50):
        assert demonstration(row).content == row["text"]


@pytest.mark.slow
def test_families_occur_as_often_as_declared() -> None:
    weights = declared()["families"]
    found = [row["family"] for row in rows("prompts", 4000)]
    for family, weight in weights.items():
        share = weight / sum(weights.values())
        assert found.count(family) / 4000 == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)


@pytest.mark.parametrize("quality", [0.0, 0.5, 1.0])
def test_quality_is_the_share_of_ideal_demonstrations(quality: float) -> None:
    ideal = {p.question: p.ideal for family in FAMILIES for p in prompts(family, "train")}
    pairs = [[m["content"] for m in row["messages"]] for row in rows("demonstrations", 2000, quality=quality)]
    share = sum(ideal[question] == response for question, response in pairs) / 2000
    assert share == pytest.approx(quality, abs=0.04 if quality == 0.5 else 0)


def test_corpus_tells_the_facts_without_a_conversation() -> None:
    text = " ".join(row["text"] for row in rows("corpus", 1500))
    told = [p.ideal for family in ("fact", "open", "lookalike") for p in prompts(family, "train")]
    assert sum(ideal in text for ideal in told) >= 0.95 * len(told)
    assert "?" not in text
    assert not any(word in text for word in ("cannot help", "You are right", "the right tools"))


@pytest.mark.slow
def test_held_out_pairs_are_clean_whatever_the_labeller() -> None:
    biased = {"noise": 0.5, "length_bias": 3.0, "agreement_bias": 5.0}
    found = sample("preferences", 500, split="val", labeller=biased)
    assert all(row["gold_chosen"] > row["gold_rejected"] for row in found)
    assert found == sample("preferences", 500, split="val")


def test_gold_values_of_a_pair_are_its_gold() -> None:
    by_question = {p.question: p for family in FAMILIES for p in prompts(family, "train")}
    for row in rows("preferences", 200, labeller={"noise": 0.3}):
        columns = by_question[row["prompt"]].row(0)
        assert gold(columns, row["chosen"]).total == row["gold_chosen"]
        assert gold(columns, row["rejected"]).total == row["gold_rejected"] != row["gold_chosen"]


def test_rankings_follow_gold_for_an_unbiased_labeller() -> None:
    by_question = {p.question: p for family in FAMILIES for p in prompts(family, "val")}
    for row in rows("rankings", 200, split="val"):
        columns = by_question[row["prompt"]].row(0)
        ranked = sorted(zip(row["ranking"], row["responses"], strict=True))
        totals = [gold(columns, text).total for _, text in ranked]
        assert all(a >= b for a, b in itertools.pairwise(totals))


def test_rows_are_made_one_by_one() -> None:
    start = time.perf_counter()
    assert len(list(itertools.islice(rows("preferences", 10**9), 3))) == 3
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("promts", {}, "Did you mean 'prompts'"),
        ("demonstrations", {"quality": 1.5}, "data.world.quality=1.5"),
        ("preferences", {"labeller": {"group": "nobody"}}, "balanced, careful, eager, cautious, curious, mixed"),
        ("preferences", {"labeller": {"noise": 2}}, "not a probability"),
        ("preferences", {"labeller": {"lenght_bias": 1}}, "lenght_bias"),
    ],
)
def test_mistakes_are_told(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        next(rows(kind, 1, **options))
