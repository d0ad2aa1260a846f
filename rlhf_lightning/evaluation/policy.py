"""The evaluate stage: what each model says to held-out prompts, and what that is worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoConfig

from rlhf_lightning.callbacks.samples import as_markdown
from rlhf_lightning.callbacks.throughput import peak_memory_gb
from rlhf_lightning.data.datamodules import PreferenceData
from rlhf_lightning.data.planning import MicroBatch, token_budget
from rlhf_lightning.data.tokenize import report_skipped
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.table import as_markdown_table, show
from rlhf_lightning.files import write_json, write_jsonl
from rlhf_lightning.generation.local import Sampler
from rlhf_lightning.models.completion import CompletionModel, ScalarModel, choose_layout
from rlhf_lightning.models.loading import context_length, load_causal_lm, load_scalar_model, load_tokenizer
from rlhf_lightning.ops.groups import Group, pack
from rlhf_lightning.ops.kl import kl_estimate
from rlhf_lightning.ops.ranking import pairwise_ranking
from rlhf_lightning.ops.statistics import mean_interval, share_interval, wilson_interval
from rlhf_lightning.rewards.loading import load_reward, score

SHARES = (
    "ended_with_eos",
    "refused_harmful",
    "over_refused",
    "corrected",
    "flattered",
    "correct",
    "padded",
    "accuracy",
)
"""Metrics that are shares of yes or no: their interval is Wilson's."""


def run_evaluate(
    settings: dict[str, Any], run: Path, models: dict[str, str], make_data: Callable[..., Any]
) -> float | None:
    """Evaluate each of `models` (name: folder) and return the monitored metric of the last one.

    Args:
        settings: the plain configuration of the run.
        run: folder for metrics.json, samples/ and tensorboard/.
        make_data: builds the prompts' data module from a `tokenizer`.
    """
    options = settings["evaluate"]
    began = time.perf_counter()
    if options["rows"] < 1 or options["samples"] < 1 or options["max_new_tokens"] < 1:
        raise UserError("evaluate.rows, evaluate.samples and evaluate.max_new_tokens must be at least 1")
    if not models:
        raise UserError("nothing to evaluate: give init_from=<folder> or evaluate.models.<name>=<folder>")
    rewards = {name: folder for name, folder in models.items() if is_reward_model(folder)}
    policies = {name: folder for name, folder in models.items() if name not in rewards}
    writer = SummaryWriter(str(run / "tensorboard"))
    table: dict[str, dict[str, tuple[float, float, float]]] = {}
    judged = 0
    for name, folder in rewards.items():
        table[name], pairs = reward_accuracy(settings, folder)
        judged += pairs
    if policies:
        reference = options["reference"] or next(iter(policies.values()))
        reward = (
            load_reward(settings["reward_from"], settings["model"]["load"]["dtype"])
            if settings["reward_from"]
            else None
        )
        gold = load_reward(settings["gold_from"]) if settings["gold_from"] else None
        for name, folder in policies.items():
            data = make_data(tokenizer=load_tokenizer(folder))
            data.limit_length(context_length(folder))
            table[name], rows = evaluate_policy(settings, name, folder, data, reference, reward, gold)
            judged += len(rows)
            write_jsonl(run / "samples" / f"{name}.jsonl", rows)
            writer.add_text(f"samples/{name}", "\n\n".join(map(as_markdown, rows[:16])), 0)
    metrics: dict[str, Any] = {"perf/peak_memory_gb": peak_memory_gb()}
    for name, found in table.items():
        for metric, (mean, low, high) in found.items():
            metrics |= {f"{name}/{metric}": mean, f"{name}/{metric}_low": low, f"{name}/{metric}_high": high}
            writer.add_scalar(f"{name}/{metric}", mean, 0)
    writer.add_text("evaluation", as_markdown_table(table), 0)
    writer.close()
    last = next(reversed(table))
    metrics["monitor"] = f"{last}/{monitored(table[last], settings['monitor'])}"
    if len(table) == 1:  # one model needs no prefix
        metrics |= {key.partition("/")[2]: value for key, value in metrics.items() if key.startswith(f"{last}/")}
    metrics["perf/rows_per_s"] = judged / (time.perf_counter() - began)
    write_json(run / "metrics.json", metrics)
    show(table)
    Console().print(f"run         {run}", soft_wrap=True)
    return metrics.get(metrics["monitor"])


def is_reward_model(folder: str) -> bool:
    """Return whether a folder holds a sequence classifier."""
    path = Path(folder)
    if not path.is_dir():
        return False
    try:
        architectures = AutoConfig.from_pretrained(folder, trust_remote_code=False).architectures or []
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a model folder: {str(error).splitlines()[0][:200]}") from error
    return any("SequenceClassification" in name for name in architectures)


def evaluate_policy(
    settings: dict[str, Any], name: str, folder: str, data: Any, reference: str, reward: Any, gold: Any
) -> tuple[dict[str, tuple[float, float, float]], list[dict[str, Any]]]:
    """Return metric -> (mean, low, high) and the samples of one language model."""
    options = settings["evaluate"]
    prepare(data)
    split = "val" if "val" in data.rows else "train"
    count = min(options["rows"], len(data.rows[split]))
    batch = data.collate(split, MicroBatch(tuple(range(count)), None, None, step=0))
    lm: Any = load_causal_lm(folder, **settings["model"]["load"])
    lm.to(device(settings))
    n = options["samples"]
    # one seed for all models: the same uniforms for the same prompt make the comparison sharper
    sampler = Sampler(lm, data.template.eos_ids, options["max_new_tokens"], options["temperature"])
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(f"{name}: answers", total=count)
        drawn = sampler(
            batch.prompt_ids, n, (settings["seed"], "evaluate"), progress=lambda done: progress.advance(task, done)
        )
    responses = [data.template.decode(ids) for ids in drawn.responses]
    prompts = [text for text in batch.prompts for _ in range(n)]
    metadata = [extra for extra in batch.metadata for _ in range(n)]
    values: dict[str, Sequence[float | None]] = {
        "length": [float(len(ids)) for ids in drawn.responses],
        "ended_with_eos": [float(done) for done in drawn.finished],
    }
    if reward is not None:
        values["reward"] = score(reward, prompts, responses, metadata).tolist()
    if options["temperature"] > 0:  # greedy answers are no samples, so they estimate no divergence
        values["kl"] = sequence_kl(settings, lm, reference, batch.prompt_ids, drawn.responses, n)
    if gold is not None:
        values["gold"] = score(gold, prompts, responses, metadata).tolist()
    if settings["gold_from"] == "world":
        from rlhf_lightning.world import measures

        measured = [measures(*pair) for pair in zip(metadata, responses, strict=True)]
        values |= {name: [found.get(name) for found in measured] for name in dict.fromkeys(chain(*measured))}
    samples = [
        {"prompt": prompts[i], "response": responses[i]}
        | {k: v[i] for k, v in values.items() if v[i] is not None and not k.startswith("gold_")}
        for i in range(len(responses))
    ]
    places = [tuple(ids) for ids in batch.prompt_ids for _ in range(n)]
    return {metric: interval(metric, found, places) for metric, found in values.items()}, samples


def interval(metric: str, values: Sequence[float | None], prompts: Sequence[Any]) -> tuple[float, float, float]:
    """Return mean and 95% interval, Wilson's for shares; responses to one prompt are not independent."""
    places = [place for place, value in enumerate(values) if value is not None]
    found = [float(values[place]) for place in places]  # type: ignore[arg-type]
    return (share_interval if metric in SHARES else mean_interval)(found, [prompts[place] for place in places])


@torch.no_grad()
def sequence_kl(
    settings: dict[str, Any], lm: Any, reference: str, prompts: list[list[int]], responses: list[list[int]], n: int
) -> list[float]:
    """Return log pi(y) - log pi_ref(y) of every sampled response; their mean estimates KL(pi : ref) in nats."""
    other: Any = load_causal_lm(reference, **settings["model"]["load"]).eval()
    other.to(device(settings))
    if other.config.get_text_config().vocab_size != lm.config.get_text_config().vocab_size:
        raise UserError(f"evaluate.reference={reference} has another vocabulary, so there is no KL to it")
    lm.eval()
    policy, ref = CompletionModel(lm), CompletionModel(other)
    layout, _ = choose_layout(lm)
    groups = [Group(p, responses[i * n : (i + 1) * n]) for i, p in enumerate(prompts)]
    found = [0.0] * len(responses)
    for chosen in token_budget([g.tokens for g in groups], 8192):
        batch = pack([groups[i] for i in chosen], layout=layout).to(device(settings))
        # at the sampling temperature, the distribution the responses were drawn from
        temperature = settings["evaluate"]["temperature"]
        x = kl_estimate(policy(batch, temperature).logprobs, ref(batch, temperature).logprobs, "k1")
        sums = torch.zeros(batch.sequences, device=x.device).index_add(0, batch.sequence_ids, x).tolist()
        for place, value in zip([i * n + k for i in chosen for k in range(n)], sums, strict=True):
            found[place] = value
    return found


@torch.no_grad()
def reward_accuracy(settings: dict[str, Any], folder: str) -> tuple[dict[str, tuple[float, float, float]], int]:
    """Return a reward model's accuracy on `evaluate.preferences` with its Wilson interval, and the number of pairs."""
    preferences = settings["evaluate"]["preferences"]
    if not preferences:
        raise UserError(f"{folder} is a reward model; give held-out pairs with evaluate.preferences=<file or world>")
    shared = {k: v for k, v in settings["data"].items() if k not in ("_target_", "ptx", "ptx_batch_size")}
    data = PreferenceData(load_tokenizer(folder), **shared | {"train": None, "val": preferences})
    data.setup()
    model: Any = load_scalar_model(folder, trained=True).eval()
    model.to(device(settings))
    data.layout, _ = choose_layout(model)
    scorer, right, pairs = ScalarModel(model), 0.0, 0
    for batch in data.val_dataloader():
        batch = batch.to(device(settings))
        _, gaps = pairwise_ranking(scorer(batch), batch.ranks, batch.group_of, batch.margins, batch.labels)
        right += float((gaps > 0).sum() + 0.5 * (gaps == 0).sum())
        pairs += len(gaps)
    return {"accuracy": (right / pairs, *wilson_interval(right, pairs))}, pairs


def prepare(data: Any) -> None:
    """Read and tokenize the prompts: the held-out ones, or the training ones where there are no others."""
    if data.sources["val"] is not None:
        data.sources["train"] = None
    data.setup()
    report_skipped(data)


def monitored(found: dict[str, Any], wanted: str) -> str:
    """Return the metric a sweep reads: the wanted one, or the best that was measured."""
    return next(metric for metric in (wanted, "gold", "reward", "accuracy", "length") if metric in found)


def device(settings: dict[str, Any]) -> str:
    """Return where to compute, from the trainer's accelerator."""
    wanted = settings["trainer"]["accelerator"] in ("gpu", "cuda")
    return "cuda" if wanted and torch.cuda.is_available() else "cpu"
