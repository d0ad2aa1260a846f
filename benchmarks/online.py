"""Times GRPO, RLOO and PPO beside TRL's trainers: the same prompts, model, optimizer and numbers of samples.

Both sides are processes that live at the same time and take turns, one iteration each (see compare.py). Each side
draws its own samples, so equality is checked where it can be: equal prompts, no KL at the first iteration, the
loss that a side's own rewards and lengths imply (GRPO, RLOO), and mean lengths and rewards within sampling error.
tests/oracle shows that the losses of GRPO and RLOO are equal on given samples.

PPO needs `--ppo-python`, the interpreter of an environment with trl 1.12.0, the last release with a PPOTrainer.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compare import Side
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rlhf_lightning import PromptData
from rlhf_lightning.models.loading import load_scalar_model, load_tokenizer, resolve_model
from rlhf_lightning.ops.advantages import grpo, rloo

# kind of trainer, prompts and samples per iteration, and the critic on our side; TRL's is always a separate model.
# Both sides train the two models of PPO in parts of about four responses, or they take more than 24 GB together
PARTS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
PPO = {"kind": "ppo", "prompts": 16, "samples": 1, "micro": 1024, "theirs": PARTS}
WORKLOADS: dict[str, dict[str, Any]] = {
    "grpo": {"kind": "grpo", "prompts": 4, "samples": 4, "critic": None},
    "rloo": {"kind": "rloo", "prompts": 4, "samples": 4, "critic": None},
    "ppo": PPO | {"critic": "model"},
    "ppo-value-head": PPO | {"critic": "value_head"},
}
SETTINGS = {"default": {}, "no checkpointing": {"gradient_checkpointing": False}}
PROGRAM = "side_online.py"
LENGTHS = {"until EOS": False, "fixed": True}


def write_prompts(options: argparse.Namespace, prompts: int, cache: str) -> list[str]:
    """Write the prompts for our side and, in the order in which it will take them, for TRL's; return both files."""
    count = prompts * (options.steps + 1)
    tokenizer = load_tokenizer(options.model)
    rows: list[dict[str, Any]] = []
    template = PromptData(tokenizer, []).template
    with gzip.open(options.data, "rt") if options.data.endswith(".gz") else open(options.data) as lines:
        while len(rows) < count and (line := lines.readline()):
            prompt = json.loads(line)["prompt"]
            ids = template.prompt(prompt)
            if len(ids) <= options.max_prompt:
                rows.append({"prompt": prompt, "ids": ids})
    if len(rows) < count:
        raise SystemExit(f"{options.data} has {len(rows)} prompts of at most {options.max_prompt} tokens, not {count}")
    texts = [{"prompt": row["prompt"]} for row in rows]
    data = PromptData(tokenizer, texts, batch_size=prompts, max_length=10_000, cache_dir=cache)
    data.setup()
    order = [place for micro in data._plan() for place in micro.rows]
    files = [f"{cache}/prompts-{prompts}.json", f"{cache}/ordered-{prompts}.json"]
    for file, content in zip(files, (rows, [rows[i] for i in order]), strict=True):
        Path(file).write_text(json.dumps(content))
    return files


def write_reward(options: argparse.Namespace, cache: str) -> str:
    """Write the model whose random score head is reward and critic of both sides, once."""
    folder = f"{cache}/reward"
    if not Path(folder).exists():
        load_scalar_model(options.model, seed=7).save_pretrained(folder)
        load_tokenizer(options.model).save_pretrained(folder)
    return folder


# ---- are both sides doing the same? --------------------------------------------------------------------------------


def implied_loss(kind: str, ours: bool, step: dict[str, Any], samples: int) -> float:
    """Return the policy loss at ratio 1 and no KL: minus the mean advantage, over tokens except in TRL's RLOO."""
    rewards = torch.tensor(step["rewards"]).view(-1, samples)
    advantages = (grpo if kind == "grpo" else rloo)(rewards).flatten()
    weights = torch.tensor(step["lengths"]).float() if ours or kind == "grpo" else torch.ones(len(advantages))
    return -(advantages * weights).sum().item() / weights.sum().item()


def check(workload: dict[str, Any], steps: list[list[dict[str, Any]]], tolerance: float) -> list[float] | None:
    """Stop unless both sides had the same prompts and started on policy; return the losses each should begin with."""
    prompts = [of_side[-1]["prompt_tokens"] for of_side in steps]
    if prompts[0] != prompts[1]:
        raise SystemExit(f"the prompts differ: {prompts} tokens")
    if len(steps[0]) > 1:
        return None
    kls = [of_side[0]["kl"] for of_side in steps]
    if max(map(abs, kls)) > tolerance:
        raise SystemExit(f"the policies do not start as their references: KL {kls}")
    if workload["kind"] == "ppo":  # the logged loss is a mean over epochs that have changed the policy
        return None
    expected = [implied_loss(workload["kind"], side == 0, steps[side][0], workload["samples"]) for side in (0, 1)]
    for of_side, loss in zip(steps, expected, strict=True):
        if abs(of_side[0]["loss"] - loss) > tolerance:
            raise SystemExit(f"the first loss is {of_side[0]['loss']}; rewards and lengths imply {loss}")
    return expected


def apart(steps: list[list[dict[str, Any]]], name: str, shorter_than: float = math.inf) -> float:
    """Return how many standard errors the sides' mean lengths or rewards are apart, over responses of some length."""
    a, b = (
        [value for step in of_side for value, n in zip(step[name], step["lengths"], strict=True) if n < shorter_than]
        for of_side in steps
    )
    if min(len(a), len(b)) < 2:
        return 0.0
    error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
    gap = abs(statistics.mean(a) - statistics.mean(b))
    return gap / error if error else (0.0 if gap == 0 else math.inf)


# ---- timing --------------------------------------------------------------------------------------------------------


def compare(name: str, setting: str, length: str, options: argparse.Namespace, cache: str) -> dict[str, Any]:
    """Return the medians, pairwise ratios and peaks of a workload, a setting of TRL and a way to end responses."""
    workload = WORKLOADS[name]
    files = write_prompts(options, workload["prompts"], cache)
    spec = workload | {
        "model": options.model, "new_tokens": options.new_tokens, "beta": 0.05, "lr": 1e-6, "cache": cache,
        "fixed": LENGTHS[length], "micro": workload.get("micro", options.microbatch_tokens),
        "options": SETTINGS[setting] | workload.get("theirs", {}),
        "pad_id": load_tokenizer(options.model).pad_token_id,
    }  # fmt: skip
    python = sys.executable
    if spec["kind"] == "ppo":
        spec["reward"], python = write_reward(options, cache), options.ppo_python
    sides = [
        Side(spec | {"side": "ours", "data": files[0]}, PROGRAM),
        Side(spec | {"side": "trl", "data": files[1]}, PROGRAM, python),
    ]
    steps: list[list[dict[str, Any]]] = [[], []]
    expected = None
    with Progress(transient=True) as bar:
        task = bar.add_task(f"{name}, TRL {setting}, {length}", total=2 * (options.steps + 1))
        for _ in range(options.steps + 1):  # the first is a warm-up, and shows whether both start alike
            for side, of_side in zip(sides, steps, strict=True):
                of_side.append(side.ask("go"))
                bar.advance(task)
            expected = check(workload, steps, options.tolerance) or expected
    peaks = [side.ask("end")["peak_gb"] for side in sides]
    # a response that was cut off is read without an EOS by TRL's PPO and with one here, as the reward model learned it
    read_alike = options.new_tokens if spec["kind"] == "ppo" else math.inf
    gaps = {"lengths": apart(steps, "lengths"), "rewards": apart(steps, "rewards", read_alike)}
    if max(gaps.values()) > 4:
        raise SystemExit(f"{name}: the sides sample differently, by {gaps} standard errors")
    result = {"workload": name, "trl": setting, "length": length, "peaks_gb": peaks, "gaps": gaps}
    return result | summary(steps) | {"implied_losses": expected, "steps": steps}


def summary(steps: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the figures of the timed steps, ours first."""
    timed = [of_side[1:] for of_side in steps]
    seconds = [[step["seconds"] for step in of_side] for of_side in timed]
    tokens = [[sum(step["lengths"]) for step in of_side] for of_side in timed]
    each = [[s / n for s, n in zip(*pair, strict=True)] for pair in zip(seconds, tokens, strict=True)]
    parts = [
        {name: statistics.median(step["parts"].get(name, 0.0) / step["seconds"] for step in of_side)
         for name in of_side[0]["parts"]}
        for of_side in timed
    ]  # fmt: skip
    ratios = [theirs / ours for ours, theirs in zip(*seconds, strict=True)]
    token_ratios = [theirs / ours for ours, theirs in zip(*each, strict=True)]
    return {
        "seconds": [statistics.median(s) for s in seconds], "seconds_per_token": [statistics.median(s) for s in each],
        "tokens_per_s": [1 / statistics.median(s) for s in each], "parts": parts,
        "mean_length": [statistics.mean(x for step in of_side for x in step["lengths"]) for of_side in steps],
        "ratio": statistics.median(ratios), "ratios": ratios,
        "token_ratio": statistics.median(token_ratios), "token_ratios": token_ratios,
    }  # fmt: skip


def show(results: list[dict[str, Any]]) -> None:
    """Print a row per comparison; where there are two numbers, ours comes first."""
    table = Table(title="here / TRL; median of iterations, ratios of pairs, peak memory of the process")
    columns = ("workload", "TRL's setting", "responses", "seconds", "TRL / here", "sampled tokens/s",
               "per token, TRL / here", "mean length", "GB", "sampling")  # fmt: skip
    for name in columns:
        table.add_column(name)
    for r in results:
        low, high = min(r["token_ratios"]), max(r["token_ratios"])
        table.add_row(
            r["workload"], r["trl"], r["length"], pair(r["seconds"], "{:.2f}"), f"{r['ratio']:.2f}",
            pair(r["tokens_per_s"], "{:.0f}"), f"{r['token_ratio']:.2f} ({low:.2f}..{high:.2f})",
            pair(r["mean_length"], "{:.1f}"), pair(r["peaks_gb"], "{:.1f}"),
            " / ".join(f"{p.get('rollout', 0.0):.0%}" for p in r["parts"]),
        )  # fmt: skip
    Console(width=170).print(table)


def pair(values: list[float], form: str) -> str:
    return " / ".join(form.format(value) for value in values)


def versions(python: str) -> dict[str, str]:
    """Return the versions of the packages that an interpreter imports."""
    names = ("torch", "transformers", "trl")
    code = f"import json; from importlib.metadata import version as v; print(json.dumps({{n: v(n) for n in {names}}}))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", help=", ".join(WORKLOADS) + "; all that can run by default")
    parser.add_argument("--model", default="smollm2", help="model folder, or smollm2 from its wheel")
    parser.add_argument("--data", required=True, help="prompts as .jsonl or .jsonl.gz, as conversations")
    parser.add_argument("--ppo-python", help="interpreter of an environment with trl 1.12.0")
    parser.add_argument("--max-prompt", type=int, default=256, help="leave out longer prompts")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--microbatch-tokens", type=int, default=4096, help="of our side, except in PPO")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of the first KL and loss")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=SETTINGS, help="of TRL")
    parser.add_argument("--lengths", nargs="*", default=list(LENGTHS), choices=LENGTHS, help="how responses end")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/online.json"))
    options = parser.parse_args()
    options.model = resolve_model(options.model, Path.home() / ".cache" / "rlhf_lightning")
    names = options.workloads or [name for name, w in WORKLOADS.items() if w["kind"] != "ppo" or options.ppo_python]
    if any(WORKLOADS[name]["kind"] == "ppo" for name in names) and not options.ppo_python:
        parser.error("PPO needs --ppo-python: python -m venv DIR && DIR/bin/pip install trl==1.12.0")
    about = {
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "versions": versions(sys.executable) | {"lightning": version("lightning")},
        "ppo_versions": versions(options.ppo_python) if options.ppo_python else None,
        "options": {key: str(value) for key, value in vars(options).items()},
    }  # fmt: skip
    results: list[dict[str, Any]] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        for name, length, setting in ((n, x, s) for n in names for x in options.lengths for s in options.settings):
            results.append(compare(name, setting, length, options, cache))
            show(results)
            options.out.write_text(json.dumps(about | {"results": results}, indent=1))
    print(options.out)


if __name__ == "__main__":
    main()
