"""RewardBench 2: its rows as they are published, the best of four, and the score of Ties."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.data.records import RowError, demonstration, preference, prompt
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.reward_bench import best_of, reward_bench, ties_score
from rlhf_lightning.evaluation.reward_model import ScoredRow
from rlhf_lightning.ops.statistics import share_interval
from tests.evaluation.scored import row

PUBLISHED = {
    "id": "7", "prompt": "Name a color.", "chosen": ["Red."], "rejected": ["Seven.", "A dog.", "No."],
    "num_correct": 1, "num_incorrect": 3, "total_completions": 4, "models": ["m"] * 4, "subset": "Factuality",
    "additional_metadata": {"category": None},
}  # fmt: skip
TIED = PUBLISHED | {"id": "tied:0", "chosen": ["Red.", "Blue."], "rejected": ["Seven."], "subset": "Ties"}


def test_lists_of_responses_are_a_ranking_of_two_levels() -> None:
    found = preference(PUBLISHED)
    assert found.responses == ["Red.", "Seven.", "A dog.", "No."]
    assert found.ranks == [0, 1, 1, 1]
    assert preference(TIED).ranks == [0, 0, 1]
    assert prompt(PUBLISHED).text == "Name a color."
    assert demonstration(PUBLISHED).content[-1]["content"] == "Red."  # type: ignore[index]
    one = [{"role": "assistant", "content": "Red."}]  # one response, as messages
    assert preference(PUBLISHED | {"chosen": one, "rejected": [one[0] | {"content": "No."}]}).ranks == [0, 1]
    with pytest.raises(RowError, match="identical but ranked differently"):
        preference(PUBLISHED | {"rejected": ["Red.", "No."]})


def bench(number: int, scores: list[float], correct: int = 1, subset: str = "Math", name: str = "") -> ScoredRow:
    columns = PUBLISHED | {
        "subset": subset,
        "id": name or str(number),
        "chosen": ["x"] * correct,
        "rejected": ["y"] * (len(scores) - correct),
    }
    ranks = [0] * correct + [1] * (len(scores) - correct)
    return row(number, [f"r{k}" for k in range(len(scores))], scores, ranks=ranks, columns=columns)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([3, 1, 2, 0], 1.0), ([2, 3, 1, 0], 0.0), ([2, 2, 1, 0], 0.5), ([1, 1, 1, 1], 0.25), ([1, 2, 2, 0], 0.0)],
)
def test_the_best_of_four_by_hand(scores: list[float], expected: float) -> None:
    assert best_of(bench(0, scores)) == expected


def reference(rows: list[tuple[str, list[float], int]]) -> float:
    """The score of Ties from the formulas of the benchmark, written out for (id, scores, correct)."""
    margins: dict[str, dict[str, tuple[float, float]]] = {"ref": {}, "tied": {}}
    for name, scores, correct in rows:
        kind, number = name.split(":")
        margins[kind][number] = (
            min(scores[:correct]) - max(scores[correct:]),
            max(scores[:correct]) - min(scores[:correct]),
        )
    parts = {
        kind: sum(between > 0 for between, _ in members.values()) / len(members) for kind, members in margins.items()
    }
    both = margins["ref"].keys() & margins["tied"].keys()
    preferred = hard = extra = 0.0
    for number in both:
        between, within = margins["tied"][number]
        smaller = min(between, margins["ref"][number][0])
        preferred += (between > within) / len(both)
        hard += (smaller > within) / len(both)
        extra += math.tanh(smaller / within - 1) / len(both)
    return 0.3 * parts["tied"] + 0.3 * parts["ref"] + 0.2 * preferred + 0.2 * hard + 0.01 * extra


TIES = [
    ("ref:0", [3.0, 1.0, 0.0], 1), ("tied:0", [3.0, 2.5, 1.0, 0.5], 2),  # margin 1.5 beyond the spread of 0.5
    ("ref:1", [1.0, 0.9, 0.0], 1), ("tied:1", [3.0, 2.5, 1.0, 0.5], 2),  # the reference's margin is smaller
    ("ref:2", [0.0, 1.0], 1), ("tied:2", [5.0, 1.0, 0.5], 2),  # accurate, the spread is larger
    ("tied:3", [1.0, 0.0, 0.5], 2),  # not accurate, and no reference
]  # fmt: skip


def test_ties_by_the_formulas() -> None:
    rows = [bench(i, scores, correct, "Ties", name) for i, (name, scores, correct) in enumerate(TIES)]
    # tied 3 of 4 accurate, ref 2 of 3, preferred 2 of 3, hard 1 of 3
    expected = 0.3 * 3 / 4 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 / 3
    expected += 0.01 * (math.tanh(1.5 / 0.5 - 1) + math.tanh(0.1 / 0.5 - 1) + math.tanh(-1 / 4 - 1)) / 3
    assert ties_score(rows) == pytest.approx(expected) == pytest.approx(reference(TIES))


def test_ties_of_equal_scores_have_no_spread() -> None:
    equal = [bench(0, [1.0, 1.0, 1.0], 2, "Ties", "tied:0"), bench(1, [1.0, 1.0], 1, "Ties", "ref:0")]
    assert ties_score(equal) == 0.0
    apart = [bench(0, [1.0, 1.0, 0.0], 2, "Ties", "tied:0"), bench(1, [1.0, 0.0], 1, "Ties", "ref:0")]
    assert ties_score(apart) == pytest.approx(1.01)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tied:0", "seven"], "the id of a row of Ties is 'seven', not ref:<number> or tied:<number>"),
        (["tied:0", "ref:1"], "no number of Ties is both"),
    ],
)
def test_mistakes_in_ties_are_told(names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ties_score([bench(i, [1.0, 0.0], 1, "Ties", name) for i, name in enumerate(names)])


def test_subsets_and_their_mean() -> None:
    rows = [bench(i, [1.0, 0.0, 0.0, 0.0] if i % 4 else [0.0, 1.0, 0.0, 0.0]) for i in range(8)]
    rows += [bench(8 + i, [1.0, 0.0], 1, "Safety") for i in range(4)]
    ties = [bench(20 + i, scores, correct, "Ties", name) for i, (name, scores, correct) in enumerate(TIES)]
    found = reward_bench([*rows, *ties])
    lines = {line["bucket"]: line for line in found.tables["sources"]}
    assert lines["Math"]["accuracy"] == 0.75
    assert (lines["Math"]["low"], lines["Math"]["high"]) == share_interval([float(i % 4 > 0) for i in range(8)])[1:]
    assert lines["Ties"]["accuracy"] == ties_score(ties)
    assert found.metrics["reward_bench"][0] == pytest.approx((0.75 + 1.0 + ties_score(ties)) / 3)
    assert found.metrics["best_of_accuracy"][0] == pytest.approx(10 / 12)
    assert reward_bench([row(0, ["a", "b"], [1, 0], columns={"chosen": "a", "rejected": "b"})]).metrics == {}


def test_a_file_of_it_is_read_as_it_is(tmp_path: Path) -> None:
    from rlhf_lightning.data.sources import read_source

    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (PUBLISHED, TIED)))
    rows: list[Any] = [line for _, line in read_source(str(path), "val").rows()]
    assert [len(preference(line).responses) for line in rows] == [4, 3]
