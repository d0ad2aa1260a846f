"""The lecture's page is complete, and its commands, at reduced size, show what their sections claim."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from tests.helpers.cli import rlhf
from tests.test_docs import BLOCK, ROOT

PAGE = (ROOT / "docs" / "lecture.md").read_text()
SECTIONS = dict(part.split("\n", 1) for part in re.split(r"^## ", PAGE, flags=re.M)[1:])
PARTS = list(SECTIONS)[1:]  # the first is the preparation


def nightly(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that runs a command."""
    for mark in (pytest.mark.slow, pytest.mark.nightly, pytest.mark.xdist_group("lecture")):
        test = mark(test)
    return test


def command(section: str) -> list[str]:
    """Return the words after `rlhf` of a section's one command."""
    (body,) = (body for language, body in BLOCK.findall(SECTIONS[section]) if language == "bash")
    program, *words = shlex.split(body.replace("\\\n", " "))
    assert program == "rlhf"
    return words


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("section", PARTS)
def test_a_section_has_what_the_lecture_promises(section: str) -> None:
    text = SECTIONS[section]
    assert text.count("$$") >= 2, "no formula"
    assert f"hydra.{'sweep' if '-m' in command(section) else 'run'}.dir=lecture/" in text
    assert text.count("**Look at**") == text.count("**Exercise.**") == 1
    assert f'"{section}"' in Path(__file__).read_text(), "no test runs its command"


class Lecture:
    """A folder in which the preparation has been done, with smaller models."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (code,) = (body for language, body in BLOCK.findall(SECTIONS["Preparation"]) if language == "python")
        assert code.count('Path("') == 2
        exec(compile(code.replace('Path("', f'Path("{folder}/'), "lecture.md", "exec"), {"__name__": "lecture"})
        smaller = small(
            base={"+model.build.hidden_size": 64}, sft={"+max_steps": 220}, reward={"+max_steps": 80},
            ppo={"max_steps": 48}, dpo={"+max_steps": 40}, evaluate={"evaluate.rows": 128},
        )  # fmt: skip
        self.run("Preparation", *smaller)

    def run(self, section: str, *smaller: str) -> Path:
        """Run a section's command with further overrides and return its run folder."""
        words = command(section)
        rlhf(self.folder, *words, *smaller)
        (place,) = (word.partition("=")[2] for word in words if word.startswith(("hydra.run.dir", "hydra.sweep.dir")))
        return self.folder / place


@pytest.fixture(scope="module")
def lecture(tmp_path_factory: pytest.TempPathFactory) -> Lecture:
    return Lecture(tmp_path_factory.mktemp("lecture"))


def small(**stages: dict[str, Any]) -> list[str]:
    """Return overrides of a pipeline's stages; a key that a stage does not set begins with +."""
    return [
        f"{'+' * key.startswith('+')}pipeline.stages.{stage}.set.{key.lstrip('+')}={value}"
        for stage, settings in stages.items()
        for key, value in settings.items()
    ]


@nightly
def test_a_base_model_asks_on_and_sft_answers(lecture: Lecture) -> None:
    folder = lecture.run("Base model and SFT", *small(base={"max_steps": 40}, sft={"max_steps": 150}))
    before, after = rows(folder / "2_before/samples/base.jsonl"), rows(folder / "3_after/samples/sft.jsonl")
    assert [row["prompt"] for row in before] == [row["prompt"] for row in after]
    questions = [mean("?" in row["response"] for row in answers) for answers in (before, after)]
    assert questions[0] > 0.1 > 0.02 > questions[1]
    assert mean(row["gold"] for row in after) > mean(row["gold"] for row in before) + 0.3


@nightly
def test_a_rollout_has_what_a_return_is_made_of(lecture: Lecture) -> None:
    answers = rows(lecture.run("Agent, state, action, return") / "samples" / "ppo.jsonl")
    assert len(answers) == 32
    assert mean(row["kl"] for row in answers) > 0  # so a return is less than its reward
    assert all(1 <= row["length"] <= 48 and {"reward", "gold"} <= row.keys() for row in answers)


@nightly
def test_a_policy_repeats_the_phrase_that_pays(lecture: Lecture) -> None:
    folder = lecture.run("Reward hacking", "callbacks.samples.count=64")
    first, *_, last = sorted((folder / "samples").iterdir())
    said = [mean(row["response"].count("good question") for row in rows(file)) for file in (first, last)]
    assert said[1] > said[0] + 0.5
    assert mean(row["gold"] for row in rows(last)) < mean(row["gold"] for row in rows(first))


@nightly
def test_accuracy_rises_with_the_margin(lecture: Lecture) -> None:
    margins = rows(lecture.run("Bradley-Terry and the margin") / "tables" / "margins.jsonl")
    accuracy = [row["accuracy"] for row in margins if row["by"] == "score"]
    assert accuracy[-1] > accuracy[0] + 0.1


HALF = {"max_steps": 32, "+data.batch_size": 64}
LABELER = small(
    fair_reward={"max_steps": 70}, biased_reward={"max_steps": 70}, fair=HALF, biased=HALF,
    evaluate={"evaluate.rows": 256},
)  # fmt: skip


@nightly
def test_length_goes_from_the_labeler_to_the_policy(lecture: Lecture) -> None:
    values = metrics(lecture.run("Length bias, from labeler to policy", *LABELER) / "4_evaluate")
    assert values["biased_reward/shorter_accuracy_high"] < values["fair_reward/shorter_accuracy_low"]
    assert values["fair/length_high"] < values["biased/length_low"]
    assert values["biased-sft/length_low"] > 0


@nightly
def test_without_the_clip_the_policy_goes_further(lecture: Lecture) -> None:
    batches = {"max_steps": 96, "+data.batch_size": 64}
    folder = lecture.run("The clip of PPO", *small(clipped=batches, unclipped=batches))
    values = metrics(folder / "2_evaluate")
    assert values["unclipped/kl"] > values["clipped/kl"]


@nightly
def test_the_kl_falls_with_beta(lecture: Lecture) -> None:
    folder = lecture.run("The KL tether", "max_steps=32", "data.batch_size=64")
    trials = sorted(path for path in folder.iterdir() if path.name.isdigit())
    kl = [metrics(trial)["val/kl"] for trial in trials]
    assert len(kl) == 4
    assert kl[0] > kl[2] > kl[3]
    assert kl[0] > 1.5 * kl[3]


@nightly
def test_gold_reward_falls_after_its_peak(lecture: Lecture) -> None:
    folder = lecture.run(
        "Goodhart's curve", *small(ppo={"+data.batch_size": 64}, overoptimize={"overoptimize.best_of": 16})
    )
    points = rows(folder / "2_overoptimize" / "tables" / "overoptimization.jsonl")
    ppo = sorted((point for point in points if point["method"] == "ppo"), key=lambda point: point["kl"])
    assert ppo[-1]["proxy_reward"] > ppo[0]["proxy_reward"]
    assert ppo[-1]["gold_reward"] < max(point["gold_reward"] for point in ppo) - 0.1


@nightly
def test_a_labeler_who_wants_to_be_right_makes_a_policy_that_agrees(lecture: Lecture) -> None:
    folder = lecture.run("The labeler who says 2 + 2 = 5", *LABELER) / "4_evaluate"
    beliefs = {row["model"]: row for row in rows(folder / "tables" / "sources.jsonl") if row["bucket"] == "belief"}
    assert beliefs["biased_reward"]["high"] < beliefs["fair_reward"]["low"]
    values = metrics(folder)  # of 45 prompts about beliefs, so the intervals of the policies overlap
    agrees = {name: values[f"{name}/flattered"] - values[f"{name}/corrected"] for name in ("fair", "biased")}
    assert agrees["biased"] > agrees["fair"]


@nightly
def test_the_majority_takes_from_the_minority(lecture: Lecture) -> None:
    steps = {"max_steps": 32}
    folder = lecture.run(
        "Two cultures and the majority",
        *small(
            base={"+model.build.hidden_size": 64}, sft={"+max_steps": 220}, one_head=steps, heads=steps,
            ppo_majority=HALF, ppo_share={"max_steps": 4}, ppo_mean=HALF, ppo_worst={"max_steps": 4}, evaluate={"evaluate.rows": 192},
        ),
    )  # fmt: skip
    values = metrics(folder / "12_evaluate")
    assert values["majority/gold_curious"] > values["sft/gold_curious"]
    assert values["majority/gold_cautious"] < values["mean/gold_cautious"]


@nightly
def test_better_judges_make_better_policies(lecture: Lecture) -> None:
    folder = lecture.run("RLAIF: how good must the judge be?", *small(evaluate={"evaluate.rows": 256}))
    values = metrics(folder / "7_evaluate")
    assert values["dpo_00/gold"] > values["dpo_40/gold"]
    assert values["dpo_00-sft/gold_low"] > 0


@nightly
def test_revised_answers_are_better(lecture: Lecture) -> None:
    values = metrics(lecture.run("Critique and revise", "data.world.rows=256"))
    assert values["revision_2/gold"] > values["first/gold"]


@nightly
def test_refusals_end_with_a_forced_opening(lecture: Lecture) -> None:
    folder = lecture.run(
        "Jailbreaks", "probe.rows=12", "probe.jailbreaks.suffix_prompts=1", "probe.jailbreaks.suffix_steps=2"
    )
    found = {row["metric"]: row["value"] for row in rows(folder / "tables" / "probes.jsonl")}
    assert {f"answered_{attack}" for attack in ("plain", "persona", "role_play", "turns", "suffix")} <= found.keys()
    assert found["drop_8"] > 0.2  # a forced opening gets through where it refuses a plain request


@nightly
def test_reward_costs_kl(lecture: Lecture) -> None:
    folder = lecture.run("DPO against PPO on equal terms", "overoptimize.rows=96", "overoptimize.best_of=8")
    points = rows(folder / "tables" / "overoptimization.jsonl")
    assert {"ppo", "dpo", "best_of_n"} <= {point["method"] for point in points}
    best = [point for point in points if point["method"] == "best_of_n"]
    assert best[-1]["gold_reward"] > best[0]["gold_reward"]


@nightly
def test_the_small_aligned_model_is_preferred(lecture: Lecture) -> None:
    folder = lecture.run(
        "A small aligned model against a large base model",
        *small(large={"+model.build.hidden_size": 128, "+model.build.layers": 3}, sft={"+max_steps": 200}, dpo={"+max_steps": 40}, evaluate={"evaluate.rows": 128}),
    )  # fmt: skip
    values = metrics(folder / "4_evaluate")
    assert values["sft-large/gold_win_rate_low"] > 0.5
    assert values["dpo-large/gold_win_rate_low"] > 0.5
