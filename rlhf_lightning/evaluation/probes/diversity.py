"""Diversity: how different the samples of one prompt are, and whether different prompts get one response."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torchmetrics.functional.text import bleu_score

from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.evaluation.probes.measures import Column, Rule, at_first, result
from rlhf_lightning.evaluation.probes.probe import Result, Row, Subject
from rlhf_lightning.evaluation.probes.rows import conversation, normalized, world_prompts
from rlhf_lightning.generation.engine import truncation

RULES = (
    Rule("unique", "only {value:.0%} of the further samples of a prompt differ from the others", below=0.3, margin=0.1),
    Rule("self_bleu", "samples of one prompt are alike: their self-BLEU is {value:.2f}", above=0.9, margin=0.1),
    Rule("common", "{value:.0%} of all responses are one and the same, whatever the prompt", above=0.2, margin=0.05),
    Rule("entropy", "it spreads its probability less: {value:.2f} nats per token", below=0.0, margin=0.3),
)


def run(subject: Subject, rows: Sequence[Row], num_generations: int) -> Result:
    """Return how different samples are.

    distinct_n is the number of different n-grams over that of all n-grams in the samples of a prompt (Li et al. 2016,
    arXiv 1510.03055); self_bleu the mean BLEU-4, smoothed, of a sample against the others of its prompt (Zhu et al.
    2018, arXiv 1802.01886); unique (d - 1) / (n - 1) of d different samples among n; entropy the mean -log p of a
    sampled token in nats, which estimates that of the model at the sampling temperature 1; common the share of the
    responses that are equal to the most frequent one.

    Raises:
        UserError: greedy responses, or fewer than two of a prompt.
    """
    check_options(subject.temperature, num_generations)
    responses, columns = measure(subject, rows, num_generations)
    before = measure(subject.reference, rows, num_generations)[1] if subject.reference else None
    return result(columns, rows, responses, before, RULES)


def check_options(temperature: float, num_generations: int) -> None:
    """Raise a UserError for greedy responses, or fewer than two of a prompt."""
    if temperature == 0:
        raise UserError("probe=diversity compares samples, and with probe.temperature=0 all are the same")
    check_number("probe.diversity.num_generations", num_generations, "[2, inf)", whole=True)


def measure(subject: Subject, rows: Sequence[Row], n: int) -> tuple[list[str], dict[str, Column]]:
    """Return n responses to each row; what is measured of all samples of a prompt stands at the first of them."""
    prompts = [conversation(row["prompt"]) for row in rows]
    answers = subject.answers(prompts, "diversity", num_generations=n)
    texts = answers.texts
    groups = [texts[place * n : (place + 1) * n] for place in range(len(rows))]
    ((frequent, most),) = Counter(map(normalized, texts)).most_common(1)
    columns: dict[str, Column] = {
        "distinct_1": at_first([distinct(group, 1) for group in groups], n),
        "distinct_2": at_first([distinct(group, 2) for group in groups], n),
        "self_bleu": at_first([self_bleu(group) for group in groups], n),
        "unique": at_first([(len(set(map(normalized, group))) - 1) / (n - 1) for group in groups], n),
        "common": [float(most > 1 and normalized(text) == frequent) for text in texts],
    }
    if subject.temperature == 1 and not truncation(subject.engine):  # else samples are not the model's
        repeated = [prompt for prompt in prompts for _ in range(n)]
        logprobs = subject.logprobs(repeated, answers.token_ids)
        columns["entropy"] = [-values.mean().item() if len(values) else None for values in logprobs]
    return texts, columns


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Return the number of different n-grams of words over that of all, None where there are none."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(texts: Sequence[str]) -> float:
    """Return the mean smoothed BLEU-4 of each text against the others."""
    scores = [
        bleu_score([text], [[*texts[:place], *texts[place + 1 :]]], n_gram=4, smooth=True).item()
        for place, text in enumerate(texts)
    ]
    return sum(scores) / len(scores)


def world_rows(count: int, seed: int) -> list[Row]:
    """Return prompts of the world that ask for something harmless."""
    return world_prompts(("fact", "arithmetic", "list", "open", "lookalike"), count, seed)
