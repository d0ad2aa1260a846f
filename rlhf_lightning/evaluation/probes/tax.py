"""The alignment tax: what training cost a model, in perplexity on held-out text and in problems solved."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from rlhf_lightning.data.messages import Message, RowError, read_messages
from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.evaluation.attempts import pass_at_k
from rlhf_lightning.evaluation.probes.measures import Column, Rule, alarms, at_first, compared, interval, result
from rlhf_lightning.evaluation.probes.probe import Prompt, Result, Row, Subject
from rlhf_lightning.evaluation.probes.rows import conversation, prompt_problem, world_prompts
from rlhf_lightning.ops.statistics import Interval
from rlhf_lightning.rewards.checkers import exact_answer
from rlhf_lightning.rewards.numbers import last_number
from rlhf_lightning.world import rows as of_world

RULES = (
    Rule("nll", "held-out text costs it {value:.2f} nats per token", above=math.inf, margin=0.05),
    Rule("pass_at_1", "it solves {value:.0%} of the problems at the first attempt", below=0.0, margin=0.02),
)
"""Both only by the change from a reference: how much text costs and what is solved depends on the model's size."""


def run(subject: Subject, rows: Sequence[Row], num_generations: int, pass_at: int | Sequence[int]) -> Result:
    """Return the mean negative log-likelihood of a held-out token, perplexity = exp of it, and pass@k.

    pass_at_k is the chance that one of k attempts has the right last number, from n attempts (Chen et al. 2021, arXiv
    2107.03374).

    Raises:
        UserError: a k above `num_generations`, or a reference with another tokenizer.
    """
    check_options(subject.temperature, num_generations, pass_at)
    pass_at = [pass_at] if isinstance(pass_at, int) else pass_at
    solving = [row for row in rows if row.get("answer") not in (None, "")]
    reading = [row for row in rows if "text" in row or "messages" in row]
    found = Result({}, [])
    if solving:
        responses, columns = attempts(subject, solving, num_generations, pass_at)
        before = attempts(subject.reference, solving, num_generations, pass_at)[1] if subject.reference else None
        shown = [row if "prompt" in row else row | {"prompt": asked(row)} for row in solving]
        found = result(columns, shown, responses, before)
    if reading:
        metrics, counts = likelihoods(subject, reading)
        found = Result(metrics | found.metrics, found.samples, counts=counts | found.counts)
    return Result(found.metrics, found.samples, alarms=alarms(RULES, found.metrics), counts=found.counts)


def check_options(temperature: float, num_generations: int, pass_at: int | Sequence[int]) -> None:
    """Raise a UserError for a k above `num_generations`."""
    check_number("probe.tax.num_generations", num_generations, "[1, inf)", whole=True)
    for k in pass_at if isinstance(pass_at, list | tuple) else [pass_at]:
        check_number("probe.tax.pass_at", k, f"[1, {num_generations}]", whole=True)


def likelihoods(subject: Subject, rows: Sequence[Row]) -> tuple[dict[str, Interval], dict[str, int]]:
    """Return nll and perplexity, clustered by row, with a reference also its own and the change, and their counts."""
    prompts, texts = [held_out(row)[0] for row in rows], [held_out(row)[1] for row in rows]
    ours = subject.logprobs(prompts, texts)
    before = None
    if subject.reference is not None:
        theirs = subject.reference.logprobs(prompts, texts)
        if [*map(len, theirs)] != [*map(len, ours)]:
            raise UserError("probe.reference has another tokenizer: the perplexities are not of the same tokens")
        before = {"nll": costs(theirs)}
    of_row = [place for place, values in enumerate(ours) for _ in values]
    metrics: dict[str, Interval] = {}
    counts: dict[str, int] = {}
    for key, values in compared("nll", costs(ours), before):
        found = interval(values, of_row, difference=True)  # never a share
        assert found is not None
        metrics[key], counts[key] = found
        if not key.endswith("_change"):
            value, low, high = metrics[key]
            metrics[key.replace("nll", "perplexity")] = (math.exp(value), math.exp(low), math.exp(high))
    return metrics, counts


def costs(logprobs: Sequence[Tensor]) -> list[float]:
    """Return the negative log-likelihood of every token."""
    return [-value for values in logprobs for value in values.tolist()]


def held_out(row: Row) -> tuple[Prompt, str]:
    """Return the prompt and the text of which the likelihood is taken; a text alone has no prompt."""
    if "text" in row:
        return "", str(row["text"])
    messages = read_messages(row["messages"], "messages")
    return messages[:-1], messages[-1]["content"]


def asked(row: Row) -> list[Message]:
    """Return the conversation that asks for a solution."""
    return conversation(row["prompt"]) if "prompt" in row else read_messages(row["messages"], "messages")[:-1]


def attempts(
    subject: Subject, rows: Sequence[Row], n: int, pass_at: Sequence[int]
) -> tuple[list[str], dict[str, Column]]:
    """Return n attempts at each problem, and pass@k: for k = 1 of every attempt, else of every problem."""
    responses = subject.answer([asked(row) for row in rows], "tax", num_generations=n)
    repeated = [row for row in rows for _ in range(n)]
    solved = exact_answer([str(row.get("prompt", "")) for row in repeated], responses, repeated)
    right = [round(sum(solved[place * n : (place + 1) * n])) for place in range(len(rows))]
    columns: dict[str, Column] = {}
    for k in pass_at:
        columns[f"pass_at_{k}"] = solved if k == 1 else at_first([pass_at_k(n, c, k) for c in right], n)
    return responses, columns


def problem(row: Row) -> str | None:
    """Return why a row is neither a held-out text nor a problem; None where it is one."""
    try:
        if "prompt" in row:
            if reason := prompt_problem(row):
                return reason
        elif "messages" in row:
            messages = read_messages(row["messages"], "messages")
            if len(messages) < 2 or messages[-1]["role"] != "assistant":
                return "messages does not end with an assistant that answers"
        elif not str(row.get("text") or "").strip():
            return "it has no text, no messages and no prompt"
    except RowError as error:
        return str(error)
    if "prompt" in row and "answer" not in row:
        return "it has a prompt and no answer"
    if row.get("answer") not in (None, "") and last_number(str(row["answer"])) is None:
        return f"answer is {row['answer']!r:.40}, which has no number"
    return None


def world_rows(count: int, seed: int) -> list[Row]:
    """Return held-out additions of the world, and as many texts of its corpus."""
    problems = [
        {"prompt": row["prompt"], "answer": row["answer"]} for row in world_prompts(("arithmetic",), count // 2, seed)
    ]
    return problems + list(of_world("corpus", count - count // 2, seed=seed, split="val"))
