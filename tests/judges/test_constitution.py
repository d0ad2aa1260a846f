"""Constitutions: ours are whole, and a file that is none is told in one line."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.judges.constitution import LARGEST, load_constitution

ONE = "principles:\n  - {name: brief, judge: Prefer fewer words.}\n"


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["default", "world"])
def test_ours_have_principles_rules_and_examples_that_belong_together(name: str) -> None:
    constitution = load_constitution(name)
    assert {conflict.name for conflict in constitution.conflicts} == {"high-risk", "looks-harmful"}
    assert all(rule.rule in constitution.rules for rule in constitution.conflicts)
    assert len({text for p in constitution.principles for text in (p.judge, p.critique, p.revise)}) > 2 * len(
        constitution.principles
    )
    for example in constitution.examples:
        assert constitution.with_name(example.principle).critique
        assert example.revision != example.response
    assert len(constitution.principles) == {"default": 10, "world": 4}[name]
    assert bool(constitution.examples) == (name == "default")


def test_a_file_and_a_list_of_texts_are_constitutions_too(tmp_path: Path) -> None:
    (principle,) = load_constitution(written(tmp_path, ONE)).principles
    assert (principle.name, principle.judge) == ("brief", "Prefer fewer words.")
    assert principle.critique
    assert principle.revise
    assert [p.judge for p in load_constitution(["Be kind.", "Be brief."]).principles] == ["Be kind.", "Be brief."]


def test_principles_are_drawn_evenly_by_the_seed_parts_and_by_nothing_else() -> None:
    constitution, again = load_constitution("world"), load_constitution("world")
    drawn = [constitution.sample(0, number, 1).name for number in range(2000)]
    assert drawn == [again.sample(0, number, 1).name for number in range(2000)]
    assert drawn != [constitution.sample(1, number, 1).name for number in range(2000)]
    counts = Counter(drawn)
    assert set(counts) == {"harmless", "helpful", "honest", "concise"}
    assert min(counts.values()) > 430  # 500 +- 3.6 standard deviations of 19


def test_the_digest_is_of_every_text(tmp_path: Path) -> None:
    constitution = load_constitution("world")
    assert constitution.digest == load_constitution("world").digest
    other = dataclasses.replace(constitution, conflicts=constitution.conflicts[:1])
    assert other.digest != constitution.digest
    assert other.rules != constitution.rules


BAD = {
    "no principles": ("conflicts: []\n", "has no principles"),
    "none of them": ("principles: []\n", "has no principles: a constitution needs at least one"),
    "nothing": ("", "is not a mapping with principles, conflicts, examples but nothing"),
    "a list": ("- be kind\n", "but a list"),
    "unknown key": ("principle: []\n", "'principle' is not one of principles, conflicts, examples. Did you mean 'principles'?"),
    "unknown key of a principle": (ONE.replace("judge:", "juge:"), "principles[0]: 'juge' is not one of name, judge, critique, revise. Did you mean 'judge'?"),
    "missing text": ("principles: [{name: brief}]\n", "principles[0] has no judge"),
    "number for a text": ("principles: [{name: brief, judge: 3}]\n", "principles[0].judge is not a text but 3"),
    "empty text": ("principles: [{name: brief, judge: ''}]\n", "principles[0].judge is not a text but an empty text"),
    "text for a list": ("principles: be kind\n", "principles is not a list but a text"),
    "text for a principle": ("principles: [be kind]\n", "principles[0] is not a mapping with name, judge, critique, revise but a text"),
    "one name twice": (ONE + "  - {name: brief, judge: Again.}\n", "two principles have the name 'brief'"),
    "one rule twice": (ONE + "conflicts: [{name: a, rule: b}, {name: a, rule: c}]\n", "two conflicts have the name 'a'"),
    "one key twice": (ONE + ONE, "'principles' comes twice"),
    "example of no principle": (ONE + "examples: [{principle: breif, prompt: a, response: b, critique: c, revision: d}]\n", "examples[0].principle='breif' is not one of brief. Did you mean 'brief'?"),
    "no YAML": ("principles: [\n", "is not readable YAML"),
    "no text": (b"\xff\xfe\x00", "is not readable YAML"),
    "key of a list": ("{[1]: 2}\n", "is not readable YAML"),
    "date": ("principles: [{name: 2026-99-99, judge: a}]\n", "is not readable YAML"),
    "code": ("!!python/object/apply:os.system ['touch executed']\n", "is not readable YAML"),
    "references": ("a: &a [x, x]\nb: &b [*a, *a]\nprinciples: *b\n", "references (*) are not read"),
    "depth": ("[" * 1500, "is nested too deeply"),
    "size": ("#" * (LARGEST + 1), f"has more than {LARGEST} bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_constitution_is_told_in_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, reason = BAD[case]
    path = written(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_constitution(path)
    assert path in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert not (tmp_path / "executed").exists()


def test_a_name_that_is_none_of_ours_and_a_file_that_is_not_there() -> None:
    with pytest.raises(
        UserError, match="there is no constitution 'defualt': give one of default, world, or a file.*'default'"
    ):
        load_constitution("defualt")
    with pytest.raises(UserError, match=r"missing\.yaml cannot be read"):
        load_constitution("./missing.yaml")
    with pytest.raises(UserError, match="is a device"):
        load_constitution("/dev/zero")
