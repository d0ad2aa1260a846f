"""`rlhf stage=revise`: answers to prompts, criticized and revised by a constitution, as demonstrations for SFT."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from rich.console import Console
from rich.progress import Progress

from rlhf_lightning.data.template import Template
from rlhf_lightning.data.tokenize import report_rows
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.evaluation.policy import interval
from rlhf_lightning.evaluation.refusal import is_refusal
from rlhf_lightning.evaluation.table import COLUMNS, show
from rlhf_lightning.feedback.revision import Ask, ChatTeacher, Revised, Step, Teacher, revise, server_ask
from rlhf_lightning.feedback.shards import read, remove
from rlhf_lightning.feedback.world_teacher import WorldTeacher
from rlhf_lightning.files import write_json, write_jsonl
from rlhf_lightning.generation.chat import LocalChat
from rlhf_lightning.generation.server import Server
from rlhf_lightning.judges.constitution import Constitution, load_constitution
from rlhf_lightning.models.loading import context_length, load_causal_lm, load_tokenizer
from rlhf_lightning.ops.statistics import Interval, as_metrics, share_interval
from rlhf_lightning.rewards.scoring import Reward, score
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages.chat import local_chat

TEACHERS = ("self", "judge")


def run(run: Run) -> float | None:
    """Write demonstrations.jsonl, failures.jsonl and metrics.json, and print what the revisions changed."""
    options, folder = run.options, run.start_folder()
    constitution, gold = load_constitution(options["constitution"]), run.reward("gold_from")
    data = run.data(folder, rows=True)
    data.setup("predict")
    report_rows(data)
    chat = local_chat(run, options["max_new_tokens"], options["temperature"])
    teacher = make_teacher(run, chat, constitution)
    shards = run.folder / "shards"
    revised = {row["row"]: from_record(row["value"]) for row in read(shards)}
    left = [number for number in range(len(data.rows["train"])) if number not in revised]
    shards.mkdir(exist_ok=True)
    with Progress(transient=True) as bar, (shards / "0.jsonl").open("a", encoding="utf-8") as file:
        task = bar.add_task("revising", total=len(data.rows["train"]), completed=len(revised))
        if file.tell():
            file.write("\n")  # ends a line that a kill cut off
        for batch in batches(left, data.batch_size):
            answers = revise(
                first_answers(data, batch, chat, run.settings["seed"]),
                teacher,
                constitution,
                options["rounds"],
                run.settings["seed"],
            )
            revised |= {answer.row: answer for answer in answers}
            file.writelines(json.dumps({"row": a.row, "value": as_record(a)}, default=str) + "\n" for a in answers)
            file.flush()
            os.fsync(file.fileno())
            bar.advance(task, len(batch))
    done = [revised[number] for number in sorted(revised)]
    finish(run, done, gold)
    remove(shards)
    return None


def make_teacher(run: Run, chat: LocalChat, constitution: Constitution) -> Teacher:
    """Return who criticizes and revises.

    Raises:
        UserError: no such teacher, or a judge that is none.
    """
    options, judge = run.options, run.judge or {}
    if options["teacher"] not in TEACHERS:
        raise UserError(
            f"revise.teacher={options['teacher']} is not one of {', '.join(TEACHERS)}."
            f"{nearest(str(options['teacher']), TEACHERS)}"
        )
    if options["teacher"] == "self":
        return ChatTeacher(chat.batch, constitution, options["examples"])
    if judge.get("kind") == "world":
        return WorldTeacher(constitution, judge["error_rate"], judge["seed"])
    sampling = {"max_new_tokens": options["max_new_tokens"], "temperature": options["temperature"]}
    if judge.get("kind") == "server":
        server = Server(judge["base_url"], timeout=judge["timeout"], retries=judge["retries"])
        ask: Ask = server_ask(server, judge["model"], concurrency=judge["concurrency"], **sampling)
    elif judge.get("kind") == "local":
        ask = loaded_chat(run, str(judge["model"]), judge["dtype"], judge["template"], **sampling).batch
    else:
        raise UserError("revise.teacher=judge needs a judge that can teach: judge=local, server or world")
    return ChatTeacher(ask, constitution, options["examples"])


def loaded_chat(run: Run, model: str, dtype: str, template: str, **sampling: Any) -> LocalChat:
    """Return a model beside the one that the stage starts from."""
    lm: Any = load_causal_lm(model, dtype=dtype).eval()
    return LocalChat(
        lm.to(run.device),
        Template(load_tokenizer(model), template),
        run.build("sampler"),
        context=context_length(model),
        **sampling,
    )


def batches(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yield the rows in batches."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def first_answers(data: Any, rows: Sequence[int], chat: LocalChat, seed: int) -> list[Revised]:
    """Return the model's own answers to some prompts.

    Raises:
        UserError: a prompt that is no conversation.
    """
    columns = [dict(data.group("train", row).metadata) for row in rows]
    for row, values in zip(rows, columns, strict=True):
        if "messages" not in values:
            raise UserError(f"{data.where('train', [row])} is raw text: only answers to a conversation can be revised")
    conversations = [values["messages"] for values in columns]
    answers = chat.batch(conversations, rows, (seed, "revise", "first"))
    revised = []
    for row, values, conversation, answer in zip(rows, columns, conversations, answers, strict=True):
        first, problem = (None, str(answer)) if isinstance(answer, UserError) else (answer, None)
        revised.append(Revised(row, values, conversation, first, problem=problem))
    return revised


def as_record(answer: Revised) -> dict[str, Any]:
    """Return an answer as it is kept until the run is done."""
    return vars(answer) | {"steps": [vars(step) for step in answer.steps]}


def from_record(record: dict[str, Any]) -> Revised:
    """Return what :func:`as_record` kept."""
    steps = [Step(**step) for step in record["steps"]]
    return Revised(**{name: value for name, value in record.items() if name != "steps"}, steps=steps)


def finish(run: Run, done: Sequence[Revised], gold: Reward | None) -> None:
    """Write the rows and what is measured of them.

    Raises:
        UserError: no row could be revised.
    """
    good = [answer for answer in done if answer.failure is None]
    failures = Counter(answer.failure for answer in done if answer.failure is not None)
    write_jsonl(run.folder / "failures.jsonl", [answer.as_row() for answer in done if answer.failure is not None])
    counted = "; ".join(f"{count}: {reason}" for reason, count in failures.items())
    if not good:
        raise UserError(f"none of {len(done)} answers could be revised ({counted}); see {run.folder}/failures.jsonl")
    table = changes(good, run.options["rounds"], gold)
    steps = [step for answer in done for step in answer.steps]
    metrics: dict[str, Any] = {
        "monitor": None, "rows": len(good), "failed": len(done) - len(good),
        "failed_rounds": sum(step.failure is not None for step in steps),
    }  # fmt: skip
    for name, row in table.items():
        for metric, value in row.items():
            metrics |= as_metrics(f"{name}/{metric}", value)
    target = run.folder / "demonstrations.jsonl"
    write_jsonl(target, [answer.as_row() for answer in good])
    write_json(run.folder / "metrics.json", metrics)
    show(f"{len(good)} answers, revised", table, columns=SHOWN)
    if counted:
        Console().print(f"not revised     {counted}", style="yellow", markup=False, soft_wrap=True)
    Console().print(f"demonstrations  {target}", soft_wrap=True)


SHOWN = {"gold": COLUMNS["gold"], "refused": "refuses", "unchanged": "unchanged"} | {
    name: COLUMNS[name] for name in ("refused_harmful", "over_refused", "corrected", "flattered")
}
"""Metrics of the table -> their titles."""


def changes(answers: Sequence[Revised], rounds: int, gold: Reward | None) -> dict[str, dict[str, Interval]]:
    """Return what is measured of the first answers, and of what each round left of them."""
    prompts = [answer.conversation[-1]["content"] for answer in answers]
    table: dict[str, dict[str, Interval]] = {}
    before: list[str] = []
    for number in range(rounds + 1):
        texts = [Revised(a.row, a.columns, a.conversation, a.first, a.steps[:number]).response or "" for a in answers]
        columns: dict[str, list[float | None]] = {}
        if gold is not None:
            rows = [answer.columns for answer in answers]
            columns["gold"] = list(score(gold, prompts, texts, rows).tolist())
            if measure := getattr(gold, "measures", None):
                found = [measure(row, text) for row, text in zip(rows, texts, strict=True)]
                columns |= {name: [m.get(name) for m in found] for name in dict.fromkeys(chain(*found))}
        row = {name: interval(name, values, prompts) for name, values in columns.items()}
        row["refused"] = share_interval([float(is_refusal(text)) for text in texts], prompts)
        if before:
            row["unchanged"] = share_interval([float(a == b) for a, b in zip(before, texts, strict=True)], prompts)
        table["first" if not number else f"revision_{number}"] = row
        before = texts
    return table
