"""What stage=evaluate compares: its options checked before any work, answers from files, a judge, several attempts."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from rlhf_lightning.callbacks.stop import interrupted_at_once
from rlhf_lightning.data.layouts import Columns
from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.evaluation.attempts import ReadAnswer, attempts, check_attempts
from rlhf_lightning.evaluation.comparing import Compared, compare
from rlhf_lightning.evaluation.given import Answer, evaluate_answers, read_answers, slots_of, slots_of_files
from rlhf_lightning.evaluation.policy import Evaluation
from rlhf_lightning.evaluation.win_rates import opponents
from rlhf_lightning.files import write_jsonl
from rlhf_lightning.judges.table import load_judge
from rlhf_lightning.ops.statistics import Interval
from rlhf_lightning.rewards import spec
from rlhf_lightning.rewards.scoring import Reward
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.runtime.settings import check_names

REWARDS = {"reward": "reward_from", "gold": "gold_from"}


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Args:
        rewards: reward and gold, those that are given.
        given: name -> answers from a file.
        best_of: n, of policies that choose the best of n by the reward.
        against: the opponent of all models, None for every two.
        judges: whether the judge of the configuration is asked about pairs.
        pass_at, majority_at: k.
        verifiable: the reward that counts right attempts, and what reads answers for it.
        notes: what is to be said of it.
    """

    rewards: dict[str, Reward]
    given: dict[str, list[Answer]]
    best_of: list[int]
    against: str | None
    judges: bool
    pass_at: list[int]
    majority_at: list[int]
    verifiable: tuple[str, ReadAnswer | None]
    notes: list[str]


def plan(
    run: Run,
    policies: Sequence[str],
    *,
    answers: Any,
    best_of: Any,
    pass_at: Any,
    majority_at: Any,
    against: str | None,
    num_generations: int,
) -> Plan:
    """Return what is compared of these policies and files of answers; the others are the options of the stage.

    Raises:
        UserError: an option that cannot be, or that would have no effect.
    """
    check_names("evaluate.answers", answers)
    keys = REWARDS if policies or answers else {}
    rewards = {name: reward for name, key in keys.items() if (reward := run.reward(key)) is not None}
    numbers = {"best_of": listed(best_of), "pass_at": listed(pass_at), "majority_at": listed(majority_at)}
    for key, values in numbers.items():
        for n in values:
            check_number(f"evaluate.{key}", n, "[1, inf)", whole=True)
            if policies and n > num_generations:
                raise UserError(f"evaluate.{key}={n} needs evaluate.num_generations={n} or more")
    names = [*policies, *(f"{name}_bo{n}" for name in policies for n in numbers["best_of"]), *answers]
    if key := next((key for key, value in {**numbers, "against": against}.items() if value and not names), None):
        raise UserError(f"evaluate.{key} is about answers, and there is no language model")
    if numbers["best_of"] and not policies:
        raise UserError("evaluate.best_of is of models that answer, not of evaluate.answers")
    if numbers["best_of"] and "reward" not in rewards:
        raise UserError(
            "evaluate.best_of chooses by reward_from: give a reward model folder, module:function, or world"
        )
    judges = bool(run.judge) and not any(spec.judges(run.settings.get(key)) for key in REWARDS.values())
    if judges and len(names) < 2:
        raise UserError("judge= compares the answers of two models: evaluate.models.<name> or evaluate.answers.<name>")
    if against is not None:
        opponents(names, names[0], against)
    if (against is not None or answers) and not rewards and not judges:
        key = f"against={against}" if against is not None else f"answers.{next(iter(answers))}"
        raise UserError(f"evaluate.{key}: choose what decides which answer is better: judge=, gold_from or reward_from")
    verifiable = check_attempts(rewards, numbers["pass_at"], numbers["majority_at"])
    columns, on_bad_row = Columns(run.settings["data"]["columns"]), run.settings["data"]["on_bad_row"]
    read = {name: read_answers(run.sources[f"evaluate.answers.{name}"], columns, on_bad_row) for name in answers}
    notes = [
        f"{name}: {skipped} rows are no answers and are left out" for name, (_, skipped) in read.items() if skipped
    ]
    given = {name: found for name, (found, _) in read.items()}
    return Plan(rewards, given, **numbers, against=against, judges=judges, verifiable=verifiable, notes=notes)


def check_distinct(
    models: Collection[str], answers: Collection[str], chosen: Collection[str], baselines: Collection[str]
) -> None:
    """Raise a UserError where a model or a file of answers has the name of another row of the results.

    Args:
        chosen: names of the best of n.
        baselines: names of what reward models are compared with.
    """
    rows = [*models, *answers, *chosen, *baselines]
    differences = {f"{one}-{other}" for one, other in permutations(rows, 2)}
    for key, names in {"answers": answers, "models": models}.items():
        for name in names:
            what = "a baseline" if name in baselines else "a model" if rows.count(name) > 1 else ""
            if what := what or ("a difference of two others" if name in differences else ""):
                raise UserError(f"evaluate.{key}.{name}: this is the name of {what}; choose another")


def listed(value: Any) -> list[Any]:
    """Return an option that is one number or several as a list."""
    return value if isinstance(value, list) else [value]


def with_given(
    made: Plan, answered: Mapping[str, Evaluation], first: str, rows: int
) -> tuple[dict[str, Evaluation], list[str]]:
    """Return the evaluations with those of answers from files, and what is to be said of these.

    Args:
        first: the model beside whose answers they are put, where there are models.
        rows: prompts, at most, where there are none.
    """
    slots = slots_of(answered[first]) if answered else slots_of_files(list(made.given.values()), rows)
    result, notes = dict(answered), list(made.notes)
    for name, answers in made.given.items():
        result[name], left = evaluate_answers(answers, slots, made.rewards)
        if not result[name].samples:
            raise UserError(f"evaluate.answers.{name}: none of its {len(answers)} prompts is one that is compared")
        if left:
            why = f"which {first} has no answer beside" if answered else f"beyond evaluate.rows={rows} prompts"
            notes.append(f"{name}: {left} of {len(answers)} answers are left out, {why}")
    return result, notes


def unrated(answered: Mapping[str, Evaluation]) -> list[str]:
    """Return what is to be said of answers that a judge did not rate."""
    notes = []
    for name, answer in answered.items():
        for reward in REWARDS:
            if failed := int(sum(v or 0.0 for v in answer.columns.get(f"{reward}_failed", ()))):
                notes.append(
                    f"{name}: {failed} of {len(answer.samples)} answers got no rating by {reward}, and are left out"
                )
    return notes


def attempted(made: Plan, evaluation: Evaluation) -> dict[str, Interval]:
    """Return pass@k and majority@k of a model, where they are asked for."""
    by, read_answer = made.verifiable
    return attempts(evaluation, by, made.pass_at, made.majority_at, read_answer)


def compare_all(run: Run, made: Plan, answered: Mapping[str, Evaluation], first: str) -> Compared:
    """Compare all models, ask the judge where there is one, and write the tables of the run folder."""
    if len(answered) < 2:
        return Compared()
    seed = run.settings["seed"]
    if made.judges:
        judge = load_judge(run.judge or {})
        if hasattr(judge, "to"):
            judge.to(run.device)  # type: ignore[attr-defined]
        with contextlib.closing(judge), interrupted_at_once():
            result = compare(answered, first, made.against, judge, seed)
    else:
        result = compare(answered, first, made.against, None, seed)
    for name in ("win_rates", "ratings", "verdicts"):
        if rows := getattr(result, name):
            write_jsonl(run.folder / "tables" / f"{name}.jsonl", rows)
    return result
