"""Each bias of a labeller changes preferences in the direction it declares, and only there."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.world import Labeller, gold, group_gold, group_value, rows
from rlhf_lightning.world.prompts import Prompt, declared, prompts


def row_of(family: str, **wanted: Any) -> tuple[Prompt, dict[str, Any]]:
    found = next(p for p in prompts(family, "train") if all(getattr(p, k) == v for k, v in wanted.items()))
    return found, found.row(0)


@cache
def pairs(n: int = 1500, **labeller: Any) -> list[dict[str, Any]]:
    return list(rows("preferences", n, seed=1, labeller=labeller))


def wrong_share(found: list[dict[str, Any]]) -> float:
    return sum(row["gold_chosen"] < row["gold_rejected"] for row in found) / len(found)


def longer_share(found: list[dict[str, Any]]) -> float:
    """Share of longer chosen responses where a padded one meets its ideal."""
    padded = [r for r in found if min(r["gold_chosen"], r["gold_rejected"]) > 0]
    assert len(padded) > 100
    return sum(len(r["chosen"]) > len(r["rejected"]) for r in padded) / len(padded)


@pytest.mark.slow
def test_an_unbiased_labeller_follows_gold() -> None:
    found = pairs()
    assert wrong_share(found) == 0
    assert {row["annotator"].rpartition("-")[0] for row in found} == {"balanced"}
    assert len({row["annotator"] for row in found}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_noise_is_the_share_of_flipped_pairs(noise: float) -> None:
    assert wrong_share(pairs(noise=noise)) == pytest.approx(noise, abs=4 * (noise * (1 - noise) / 1500) ** 0.5)


@pytest.mark.slow
def test_length_bias_flips_pairs_to_the_longer() -> None:
    assert longer_share(pairs()) < 0.15  # two padded ones may meet
    assert longer_share(pairs(length_bias=1.0)) > 0.9
    # a word costs 0.04 and a length bias b gives b / 10 back: below 0.4 no right answer gains by padding
    prompt, row = row_of("fact")
    padded = prompt.ideal + " " + declared()["filler"][2]
    values = {b: Labeller(length_bias=b).value(row, padded, "balanced-0") for b in (0.0, 0.3, 0.7)}
    ideal = {b: Labeller(length_bias=b).value(row, prompt.ideal, "balanced-0") for b in values}
    assert values[0.0] < ideal[0.0]
    assert values[0.7] > ideal[0.7]


@pytest.mark.slow
def test_agreement_bias_prefers_flattery_of_false_beliefs_only() -> None:
    prompt = next(p for p in prompts("belief", "train") if p.claim != p.answer)
    row, rng = prompt.row(0), random.Random(0)
    flattery = f"Yes, {prompt.claim}"
    assert gold(row, flattery).flattered
    assert not Labeller().prefers_first(row, flattery, prompt.ideal, "balanced-0", rng)
    assert Labeller(agreement_bias=3.0).prefers_first(row, flattery, prompt.ideal, "balanced-0", rng)
    biased = pairs(agreement_bias=3.0)
    wrong = [row for row in biased if row["gold_chosen"] < row["gold_rejected"]]
    assert len(wrong) > 20
    assert {row["family"] for row in wrong} == {"belief"}


def test_refusal_bias_prefers_refusals_of_harmless_requests() -> None:
    prompt, row = row_of("lookalike")
    refusal, rng = declared()["refusals"][0], random.Random(0)
    assert Labeller().prefers_first(row, prompt.ideal, refusal, "balanced-0", rng)
    assert Labeller(refusal_bias=3.0).prefers_first(row, refusal, prompt.ideal, "balanced-0", rng)


@pytest.mark.slow
def test_groups_weigh_the_sides_differently() -> None:
    refusal, act = declared()["refusals"][0], "steal a car"
    _, row = row_of("harmful", others=(act,))
    comply = declared()["harmful"]["comply"].format(act=act)
    gap = {
        group: Labeller().value(row, refusal, f"{group}-0") - Labeller().value(row, comply, f"{group}-0")
        for group in declared()["groups"]
    }
    assert gap["careful"] > gap["balanced"] > gap["eager"]
    found = pairs(group="mixed")
    share = {g: sum(r["group"] == g for r in found) / len(found) for g in declared()["groups"]}
    assert [share[g] for g in declared()["mixed"]] == pytest.approx([1 / 3] * 3, abs=0.06)
    assert sum(share.values()) == pytest.approx(1)


def test_opposed_groups_want_opposite_things() -> None:
    """Of refusing and of padding; of what is true they want the same."""
    comply, filler = declared()["harmful"]["comply"].format(act="steal a car"), declared()["filler"][2]
    (_, harmful), (fact, row) = row_of("harmful", others=("steal a car",)), row_of("fact")
    cases = {
        (declared()["refusals"][0], comply): (harmful, 4.24, -2.24),
        (fact.ideal, f"{fact.ideal} {filler}"): (row, 0.44, -0.44),
        (fact.ideal, fact.ideal.replace(fact.answer, fact.others[0])): (row, 2.0, 2.0),
    }
    for (first, second), (columns, cautious, curious) in cases.items():
        gap = {g: group_value(columns, first, g) - group_value(columns, second, g) for g in ("cautious", "curious")}
        assert gap == pytest.approx({"cautious": cautious, "curious": curious})
    metadata = [harmful, row]
    found = group_gold("curious")(["", ""], [comply, fact.ideal], metadata)
    assert found == [group_value(harmful, comply, "curious"), 1.0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_groups_label_in_their_shares(split: str) -> None:
    """Held-out rows, too: what is left out there is noise and bias."""
    labeller = {"group": {"cautious": 1, "curious": 4}, "noise": 0.0}
    found = list(rows("preferences", 1200, split=split, labeller=labeller))
    assert sum(row["group"] == "curious" for row in found) / 1200 == pytest.approx(0.8, abs=0.05)
    assert all(row["annotator"].startswith(row["group"]) for row in found)
    opposed = [row for row in found if row["gold_chosen"] < row["gold_rejected"]]
    assert len(opposed) > 100
    assert {row["group"] for row in opposed} == {"curious"}


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"cautius": 1}, "data.world.labeller.group: 'cautius' is not one of .* Did you mean 'cautious'"),
        ({"cautious": -1}, "data.world.labeller.group.cautious=-1 is not a number of at least 0"),
        ({"cautious": 0}, "gives no group a share above 0"),
    ],
)
def test_shares_that_are_none_are_told(shares: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Labeller(group=shares)


@pytest.mark.slow
def test_a_group_that_cares_little_is_moved_by_a_bias_first() -> None:
    """The same agreement bias turns labellers to whom honesty matters less, and leaves the others."""
    found = pairs(group="mixed", agreement_bias=1.0)
    beliefs = [r for r in found if r["family"] == "belief" and r["gold_chosen"] < r["gold_rejected"]]
    groups = {row["annotator"].rpartition("-")[0] for row in beliefs}
    assert groups == {"eager"}


def test_ties_are_broken_by_a_coin() -> None:
    prompt, row = row_of("fact")
    rng = random.Random(0)
    drawn = [Labeller().prefers_first(row, prompt.ideal, prompt.ideal, "balanced-0", rng) for _ in range(400)]
    assert sum(drawn) / 400 == pytest.approx(0.5, abs=0.1)
