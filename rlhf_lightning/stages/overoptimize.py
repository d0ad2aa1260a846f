"""`rlhf stage=overoptimize`: proxy and gold reward of best-of-n and of policies against their KL to the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf_lightning.callbacks.loggers import log_table
from rlhf_lightning.callbacks.throughput import peak_memory_gb
from rlhf_lightning.errors import UserError, check_number, nearest
from rlhf_lightning.evaluation.exact_kl import can_enumerate, exact_kl
from rlhf_lightning.evaluation.overoptimization import (
    Curve,
    best_of_n_curve,
    fit,
    frontier,
    peak,
    points,
    policy_curve,
)
from rlhf_lightning.evaluation.policy import Evaluation, evaluate_policy
from rlhf_lightning.evaluation.report.images import log_figures
from rlhf_lightning.evaluation.table import as_markdown_table, cells, show
from rlhf_lightning.files import write_json, write_jsonl
from rlhf_lightning.generation.engine import truncation
from rlhf_lightning.models.folder import read_manifest
from rlhf_lightning.models.loading import load_causal_lm, resolve_model
from rlhf_lightning.ops.statistics import Interval, as_metrics
from rlhf_lightning.rewards.scoring import Reward, load_reward, to_device
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.runtime.settings import check_names
from rlhf_lightning.stages.evaluate import prompts

TITLE = "reward against d = sqrt(KL)"
COLUMNS = {
    "a": "a (95%)",
    "b": "b (95%)",
    "r2": "R²",
    "peak_kl": "KL at the peak",
    "peak_reward": "reward at the peak",
    "lost_after_peak": "lost after it",
}


@dataclass(frozen=True)
class Policy:
    """A model on the curve of a method: its setting is its name and the updates that it had."""

    method: str
    setting: str
    folder: str


def run(run: Run) -> float | None:
    """Write the tables, metrics.json and samples, and return the reward at the peak of the last curve."""
    options, load = run.options, run.settings["model"]["load"]
    policies, engine = check(run), run.build("sampler")
    if part := truncation(engine):
        raise UserError(f"sampler.{part}: samples of a cut distribution have no KL; leave top_k at 0 and top_p at 1")
    reference = run.start_folder()
    rewards, gold = proxies(run), run.reward("gold_from")
    for reward in (*rewards.values(), gold):
        to_device(reward, run.device)
    data, start = prompts(run, reference), load_causal_lm(reference, **load)
    answers = partial(
        evaluate_policy,
        data=data,
        engine=engine,
        rows=options["rows"],
        max_new_tokens=options["max_new_tokens"],
        temperature=options["temperature"],
        seed=run.settings["seed"],
        device=run.device,
    )
    golds = {} if gold is None else {"gold": gold}
    scores = {name: {f"proxy_{name}": reward} | golds for name, reward in rewards.items()}
    every = {column: reward for columns in scores.values() for column, reward in columns.items()}
    sampled = answers(start, rewards=every, num_generations=options["best_of"], title="reference")
    firsts = [row for row, (_, number) in zip(sampled.samples, sampled.places, strict=True) if number == 0]
    write_jsonl(run.folder / "samples" / "reference.jsonl", firsts)
    curves = []
    for name in rewards:
        curves.append(best_of_n_curve(sampled, name, f"proxy_{name}"))
        by_method: dict[str, dict[str, Evaluation]] = {}
        for policy in policies.get(name, ()):
            lm, title = load_causal_lm(policy.folder, **load), f"{name}: {policy.setting}"
            given = {"rewards": scores[name], "num_generations": options["num_generations"], "title": title}
            answered = answers(lm, reference=lambda: start, **given)
            if can_enumerate(lm, options["max_new_tokens"]):
                answered = with_exact_kl(answered, lm, start, data.template.eos_ids, options)
            by_method.setdefault(policy.method, {})[policy.setting] = answered
            file = f"{name}_{policy.setting}".replace(", step ", "_step_")
            write_jsonl(run.folder / "samples" / f"{file}.jsonl", answered.samples)
        baseline = curves[-1].start
        curves += [policy_curve(m, name, found, baseline, f"proxy_{name}") for m, found in by_method.items()]
    return write(run, curves)


def with_exact_kl(answered: Evaluation, lm: Any, start: Any, ends: Any, options: Mapping[str, Any]) -> Evaluation:
    """Return an evaluation with the column kl_exact, the same for all responses to a prompt."""
    asked = list(dict.fromkeys(answered.prompts))
    exact = exact_kl(lm, start, asked, ends, options["max_new_tokens"], options["temperature"])
    known = dict(zip(asked, exact, strict=True))
    column = [known[prompt] for prompt in answered.prompts]
    return replace(answered, columns={**answered.columns, "kl_exact": column})


def write(run: Run, curves: list[Curve]) -> float | None:
    """Write and show the tables, and return the reward at the peak of the last curve."""
    seed, folder, nan = run.settings["seed"], run.folder / "tables", math.nan
    table = [row for curve in curves for row in points(curve, seed)]
    write_jsonl(folder / "overoptimization.jsonl", table)
    write_jsonl(folder / "frontier.jsonl", frontier(table))
    shown: dict[str, dict[str, Interval]] = {}
    fits, stops = [], []
    for curve in curves:
        name, top = f"{curve.method}_{curve.proxy}", peak(curve)
        found = fit(curve, seed) if curve.gold is not None else None
        shown[name] = {"peak_kl": (top.kl, nan, nan), "peak_reward": top.reward, "lost_after_peak": top.lost}
        if found is not None:
            shown[name] |= {"a": found.a, "b": found.b, "r2": (found.r2, nan, nan)}
            values = {
                key: value
                for metric in ("a", "b", "r2")
                for key, value in as_metrics(metric, shown[name][metric]).items()
            }
            row = {"method": curve.method, "proxy": curve.proxy, "seed": seed, "form": found.form}
            fits.append(row | values | {"points": found.points})
        if top.lost[1] > 0:
            lost = "{:.3f} [{:.3f}, {:.3f}]".format(*top.lost)
            stops.append(f"{name}: stop at {top.setting}, KL {top.kl:.2f}; after it the reward falls by {lost}")
    write_jsonl(folder / "fits.jsonl", fits)
    metrics: dict[str, Any] = {
        key: value
        for name, row in shown.items()
        for metric in row
        for key, value in as_metrics(f"{name}/{metric}", row[metric]).items()
    }
    loggers = run.loggers()
    for logger in loggers:
        logger.log_metrics({name: metrics[name] for name in metrics if not name.endswith(("_low", "_high"))}, 0)
        header, *lines = cells(shown, COLUMNS)
        rows = [dict(zip(header, line, strict=True)) for line in lines]
        log_table(logger, "overoptimization", rows, as_markdown_table(TITLE, shown, COLUMNS), 0)
    metrics |= {"monitor": f"{list(shown)[-1]}/peak_reward", "perf/peak_memory_gb": peak_memory_gb()}
    write_json(run.folder / "metrics.json", metrics)
    log_figures(loggers, run.folder)
    for logger in loggers:
        logger.finalize("success")
    show(TITLE, shown, columns=COLUMNS)
    for line in [*stops, f"run         {run.folder}"]:
        Console().print(line, soft_wrap=True, highlight=False)
    return metrics[metrics["monitor"]]


def check(run: Run) -> dict[str, list[Policy]]:
    """Return the policies by proxy, or raise a UserError."""
    for key in ("rows", "best_of", "num_generations", "max_new_tokens"):
        check_number(f"overoptimize.{key}", run.options[key], "[1, inf)", whole=True)
    check_number("overoptimize.temperature", run.options["temperature"], "(0, inf)")
    for key in ("proxies", "policies"):
        check_names(f"overoptimize.{key}", run.options[key])
    several, single = run.options["proxies"], run.settings["reward_from"]
    if bool(several) == bool(single):
        raise UserError("give either reward_from=<proxy reward> or overoptimize.proxies.<name>=<reward model folder>")
    names = list(several) or ["reward"]
    found: dict[str, list[Policy]] = {}
    for proxy, members in run.options["policies"].items():
        if proxy not in names:
            known = ", ".join(names)
            raise UserError(f"overoptimize.policies.{proxy}: the proxies are {known}.{nearest(proxy, names)}")
        check_names(f"overoptimize.policies.{proxy}", members)
        cache = run.settings["paths"]["cache"]
        found[proxy] = [row for name, folder in members.items() for row in along(name, resolve_model(folder, cache))]
    return found


def along(name: str, folder: str) -> list[Policy]:
    """Return a policy after those that its run wrote on the way (callbacks=models)."""
    earlier = sorted(Path(folder).parent.glob("models/step_*")) if Path(folder).name == "model" else []
    found = {}
    for path in [*map(str, earlier), folder]:
        manifest = (read_manifest(path) if Path(path).is_dir() else None) or {}
        step = manifest.get("metrics", {}).get("global_step")
        setting = name if step is None else f"{name}, step {int(step)}"
        found[setting] = Policy(str(manifest.get("stage", name)), setting, path)  # the last may be there twice
    return list(found.values())


def proxies(run: Run) -> dict[str, Reward]:
    """Return the proxy rewards by name."""
    if (reward := run.reward("reward_from")) is not None:
        return {"reward": reward}
    dtype = run.settings["model"]["load"]["dtype"]
    return {name: load_reward(str(folder), dtype) for name, folder in run.options["proxies"].items()}
