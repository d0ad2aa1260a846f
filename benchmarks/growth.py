"""Measures how time and memory of a training step grow with context, responses, prompt share and model size.

Every point is a separate process, so that peak memory is measured per point. Each point has an expected time: the
FLOPs that the step needs, at the rate of the largest point of its series. Results go to a JSON file and
one picture.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

SMOLLM2 = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
           "intermediate_size": 1536, "vocab_size": 49152}  # fmt: skip
SIZES = {  # hidden size, layers, heads; a vocabulary of 8,192
    "1M": (64, 4, 1), "9M": (256, 8, 4), "34M": (512, 12, 8), "106M": (768, 16, 12), "231M": (1024, 20, 16),
}  # fmt: skip
AXES = {
    "context": ("tokens of one demonstration", True),
    "responses": ("responses K, 64 tokens each,\nof one prompt of 256 tokens", False),
    "share": ("share of the prompt\nin two pairs of 512 tokens", False),
    "size": ("parameters in millions,\n1,024 tokens", True),
}


def points() -> Iterator[dict[str, Any]]:
    """Yield every point: its series, its place on the axis, the layout, the groups of a step, the model."""
    for length in (256, 512, 1024, 2048, 4096):
        yield {"series": "context", "x": length, "layout": "packed", "groups": [[length // 2, [length // 2]]]}
    for layout in ("packed", "padded"):
        for k in range(2, 10):
            yield {"series": "responses", "x": k, "layout": layout, "groups": [[256, [64] * k]]}
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):
            prompt = int(512 * share)
            rest = (512 - prompt) // 2
            yield {"series": "share", "x": share, "layout": layout, "groups": [[prompt, [rest, rest]]] * 2}
    for hidden, layers, heads in SIZES.values():
        model = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
                 "num_key_value_heads": heads, "intermediate_size": 3 * hidden, "vocab_size": 8192}  # fmt: skip
        yield {"series": "size", "layout": "packed", "groups": [[192, [64]]] * 4, "model": model}


def measure(point: dict[str, Any], steps: int) -> None:
    """Print seconds per step (median), peak memory and needed FLOPs of one point, as JSON."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from rlhf_lightning.models.attention import GROUP_SDPA
    from rlhf_lightning.models.completion import CompletionModel, ScalarModel
    from rlhf_lightning.ops.groups import Group, pack
    from rlhf_lightning.ops.ranking import pairwise_ranking

    torch.manual_seed(0)
    config = LlamaConfig(**(point.get("model") or SMOLLM2), max_position_embeddings=4096, tie_word_embeddings=True)
    pairs = len(point["groups"][0][1]) > 1
    config.num_labels, config.pad_token_id = 1, 0
    model = (LlamaForSequenceClassification if pairs else LlamaForCausalLM)(config)
    model.set_attn_implementation(GROUP_SDPA)
    wrapped = ScalarModel(model) if pairs else CompletionModel(model)
    ids = torch.randint(1, config.vocab_size, (8192,)).tolist()
    batch = pack([Group(ids[:p], [ids[-n:] for n in ns]) for p, ns in point["groups"]], layout=point["layout"])
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-6, fused=True)

    def step() -> float:
        began = time.perf_counter()
        if pairs:
            loss = pairwise_ranking(wrapped(batch), batch.ranks, batch.group_of, batch.margins, batch.labels)[0].sum()
        else:
            loss = -wrapped(batch).logprobs.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    step()
    seconds = [step() for _ in range(steps)]
    print(json.dumps({
        "seconds": statistics.median(seconds), "all": seconds, "flops": needed_flops(config, point),
        "tokens": batch.tokens,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "parameters": sum(p.numel() for p in wrapped.parameters()),
    }))  # fmt: skip


def needed_flops(config: Any, point: dict[str, Any]) -> float:
    """Return the FLOPs of a step: 2 per weight and token, 4 D per pair of tokens and layer, times 3 with gradients."""
    hidden, share = config.hidden_size, config.num_key_value_heads / config.num_attention_heads
    layer = (2 + 2 * share) * hidden**2 + 3 * hidden * config.intermediate_size
    tokens = pairs = loss_tokens = 0
    for prompt, responses in point["groups"]:
        reads = len(responses) if point["layout"] == "padded" else 1
        tokens += reads * prompt + sum(responses)
        pairs += reads * prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in responses)
        loss_tokens += sum(responses) if len(responses) == 1 else 0  # a reward model has no vocabulary
    forward = 2 * tokens * layer * config.num_hidden_layers + 2 * loss_tokens * hidden * config.vocab_size
    return 3 * (forward + 4 * pairs * hidden * config.num_hidden_layers)


def run(point: dict[str, Any], steps: int) -> dict[str, Any]:
    """Measure one point in a separate process."""
    command = [sys.executable, __file__, "--point", json.dumps(point), "--steps", str(steps)]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if process.returncode:
        raise SystemExit(process.stderr[-2000:])
    measured = json.loads(process.stdout.strip().splitlines()[-1])
    return {"x": measured["parameters"] / 1e6} | point | measured


def expect(measured: list[dict[str, Any]]) -> None:
    """Add to every point the time its FLOPs would take at the rate of its series' largest point."""
    for series in {point["series"] for point in measured}:
        points = [point for point in measured if point["series"] == series]
        best = max(points, key=lambda point: point["flops"])
        for point in points:
            point["expected_s"] = point["flops"] / best["flops"] * best["seconds"]


def slope(points: list[dict[str, Any]], of: str) -> float:
    """Return the exponent between the two ends of a series: log(y2 / y1) / log(x2 / x1)."""
    first, last = points[0], points[-1]
    return math.log(last[of] / first[of]) / math.log(last["x"] / first["x"])


def show(points: list[dict[str, Any]]) -> None:
    """Print every point, and the exponents of the series."""
    table = Table(title="one step, float32")
    for name in ("series", "layout", "x", "tokens", "seconds", "expected", "peak GB"):
        table.add_column(name)
    for point in points:
        table.add_row(
            point["series"], point["layout"], f"{point['x']:.4g}", str(point["tokens"]), f"{point['seconds']:.3f}",
            f"{point['expected_s']:.3f}", f"{point['peak_gb']:.2f}",
        )  # fmt: skip
    console = Console(width=120)
    console.print(table)
    for (series, layout), members in grouped(points).items():
        exponent, expected = slope(members, "seconds"), slope(members, "expected_s")
        console.print(f"{series}, {layout}: exponent of time {exponent:.2f}, expected {expected:.2f}")


def grouped(points: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the points of each (series, layout), in order."""
    members: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for point in points:
        members.setdefault((point["series"], point["layout"]), []).append(point)
    return members


def draw(points: list[dict[str, Any]], picture: Path) -> None:
    """Draw time above and memory below, a column per series; dashes are the expected values."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, axes = plt.subplots(2, len(AXES), figsize=(4 * len(AXES), 6), constrained_layout=True)
    colours = {"packed": "tab:blue", "padded": "tab:orange"}
    names = {"packed": "prompt shared", "padded": "a row per response"}
    for (series, layout), members in grouped(points).items():
        column = list(AXES).index(series)
        xs = [point["x"] for point in members]
        for row, key in enumerate(("seconds", "peak_gb")):
            axes[row, column].plot(xs, [p[key] for p in members], "o-", color=colours[layout], label=names[layout])
        axes[0, column].plot(xs, [p["expected_s"] for p in members], "--", color=colours[layout], alpha=0.6)
    for column, (label, logarithmic) in enumerate(AXES.values()):
        for row, unit in enumerate(("seconds per step", "peak memory, GB")):
            axis = axes[row, column]
            axis.set(xlabel=label, ylabel=unit if column == 0 else "")
            axis.grid(alpha=0.3)
            if logarithmic:
                axis.set_xscale("log", base=2 if column == 0 else 10)
                axis.set_yscale("log")
                for part in (axis.xaxis, axis.yaxis):
                    part.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter(ticker.NullFormatter())
                axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            else:
                axis.set_ylim(bottom=0)
    if axes[0, 1].lines:
        axes[0, 1].legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each point")
    parser.add_argument("--series", nargs="*", default=list(AXES), choices=list(AXES))
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/growth.json"))
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        measure(json.loads(options.point), options.steps)
        return
    wanted = [point for point in points() if point["series"] in options.series]
    measured = []
    with Progress(*Progress.get_default_columns(), transient=True) as bar:
        for point in bar.track(wanted, description="points"):
            measured.append(run(point, options.steps))
    expect(measured)
    show(measured)
    about = {"machine": platform.processor(), "cores": os.cpu_count(), "torch": version("torch")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(about | {"points": measured}, indent=1))
    draw(measured, options.out.with_suffix(".png"))
    print(options.out, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
