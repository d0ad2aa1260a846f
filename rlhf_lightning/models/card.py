"""The model card (README.md) of an exported folder: where the model comes from, its metrics, and how to load it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from rlhf_lightning.errors import UserError
from rlhf_lightning.files import read_json

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
NOT_SHOWN = ("optim/", "perf/", "epoch", "global_step")
MOST_STAGES = 16
BEGIN, END = "<!-- evaluation -->", "<!-- end of evaluation -->"
LOADING = "## How to load it"


def model_card(folder: Path, manifest: Mapping[str, Any], manifest_name: str) -> str:
    """Return the card of a model folder that is complete but for its card.

    The front matter has the keys of the Hugging Face hub. What nobody has stated, such as a licence, is said to be not
    stated and left out of the front matter.

    Args:
        manifest: that of the folder. `sources` names its data by split, `licenses` what the user states: `model`, of
            this model, and `data`.
        manifest_name: the name of the file with the manifest of an earlier stage's folder.
    """
    adapter = (folder / "adapter_config.json").is_file()
    config = read_json(folder / "config.json") or {}
    reward = any("SequenceClassification" in str(name) for name in config.get("architectures") or [])
    stages = list(lineage(manifest, manifest_name))
    base, base_license = base_model(stages[-1])
    licenses = subdict(manifest, "licenses")
    data = [source for stage in stages for source in subdict(stage, "sources").values()]
    metadata = ModelCardData(
        base_model=base if HUB_NAME.fullmatch(base) and not Path(base).exists() else None,
        datasets=list(dict.fromkeys(name for name in data if is_hub_data(name))) or None,
        library_name="peft" if adapter else "transformers",
        license=licenses.get("model"),
        pipeline_tag="text-classification" if reward else "text-generation",
        tags=["rlhf", "rlhf_lightning", str(manifest.get("stage", ""))],
    )
    kind = "A reward model" if reward else "A language model"
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        "",
        f"# {kind}, stage {text(manifest.get('stage', '?'))}",
        "",
        f"Trained with rlhf_lightning {text(subdict(manifest, 'versions').get('rlhf-lightning', ''))}, seed "
        f"{text(manifest.get('seed', '?'))}. Weights: SHA-256 `{text(manifest.get('weights', ''))}`.",
        "",
        f"* Base model: {text(base)}",
        f"* Licence of the base model: {base_license or 'not stated'}",
        f"* Licence of this model: {text(licenses.get('model') or 'not stated')}",
        "",
        "## Stages and data",
        "",
        "| stage | data | licence of the data | seed | weights |",
        "| --- | --- | --- | --- | --- |",
        *map(stage_row, reversed(stages)),
        "",
        *metrics_table(subdict(manifest, "metrics")),
        LOADING,
        "",
        *loading(reward, adapter, config.get("base_quantization")),
    ]
    return "\n".join(lines) + "\n"


def with_evaluations(card: str, evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a card with a table of what each run of stage=evaluate measured, in place of the tables that it has.

    Args:
        evaluations: the name of a run -> the model's metrics, those with an interval also as `_low` and `_high`.
    """
    before, _, rest = card.partition(f"{BEGIN}\n")
    _, ended, after = rest.partition(f"{END}\n")
    if not ended:
        before, found, after = card.partition(f"{LOADING}\n")
        before, after = f"{before.rstrip()}\n\n", found + after
    tables = [
        line
        for run, metrics in evaluations.items()
        for line in metrics_table(metrics, "Evaluation", f"On held-out rows, by the run {text(run)}.")
    ]
    return before + "\n".join([BEGIN, "", *tables, END, "", ""]) + after.lstrip("\n")


def lineage(manifest: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    """Yield a manifest and those of the models it started from, the latest first, as far as their folders are there."""
    for _ in range(MOST_STAGES):
        yield manifest
        start = start_of(manifest)
        try:
            earlier = read_json(Path(start) / name) if start else None
        except UserError:  # of somebody else's folder
            return
        if earlier is None:
            return
        manifest = earlier


def start_of(manifest: Mapping[str, Any]) -> str:
    """Return the folder or hub name of the model that a stage started from, empty where it names none."""
    parents = manifest.get("parents")
    known = [parent for parent in parents if isinstance(parent, dict)] if isinstance(parents, list) else []
    return next((str(parent.get("folder", "")) for parent in known if parent.get("role") == "init"), "")


def base_model(first: Mapping[str, Any]) -> tuple[str, str]:
    """Return the model that the first stage started from and its licence, as the card in its folder states it."""
    name = start_of(first)
    card = Path(name) / "README.md"
    if not name or not Path(name).is_dir():
        return name or "none", ""
    if card.is_file():
        try:
            stated = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
        except (ValueError, OSError):  # a card of somebody else's that is no text or no YAML
            stated = None
        return Path(name).name, text(stated or "")
    built = Path(name).name == "init"  # made by the first stage, see runtime/run.py
    return "none, built and initialized at random by the first stage" if built else Path(name).name, ""


def stage_row(manifest: Mapping[str, Any]) -> str:
    """Return a line of the table of stages."""
    sources = subdict(manifest, "sources")
    data = ", ".join(f"{text(name)} ({text(split)})" for split, name in sources.items()) or "not stored"
    license = text(subdict(manifest, "licenses").get("data") or "not stated")
    weights = text(manifest.get("weights", ""))[:12]
    return (
        f"| {text(manifest.get('stage', '?'))} | {data} | {license} | {text(manifest.get('seed', '?'))} | {weights} |"
    )


def metrics_table(
    metrics: Mapping[str, Any], title: str = "Metrics", when: str = "At the end of its training."
) -> Iterator[str]:
    """Yield a table of metrics; those that are ends of an interval stand beside its middle."""
    numbers = {
        name: value for name, value in metrics.items() if isinstance(value, int | float) and math.isfinite(value)
    }
    names = [name for name in sorted(numbers) if not name.startswith(NOT_SHOWN)]
    names = [n for n in names if not (n.endswith(("_low", "_high")) and n.rpartition("_")[0] in numbers)]
    if not names:
        return
    yield from (
        f"## {title}",
        "",
        when,
        "",
        "| metric | value | 95% interval |",
        "| --- | --- | --- |",
    )
    for name in names:
        low, high = numbers.get(f"{name}_low"), numbers.get(f"{name}_high")
        interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        yield f"| {text(name)} | {numbers[name]:.4g} | {interval} |"
    yield ""


def loading(reward: bool, adapter: bool, quantization: Any = None) -> Iterator[str]:
    """Yield how transformers, vLLM and Ollama load the folder, `.` being its place.

    Args:
        quantization: of the weights that an adapter was trained on.
    """
    kind = "SequenceClassification" if reward else "CausalLM"
    auto = f"AutoPeftModelFor{kind}" if adapter else f"AutoModelFor{kind}"
    apart = [f"from peft import {auto}", "from transformers import AutoTokenizer"]
    imports = apart if adapter else [f"from transformers import {auto}, AutoTokenizer"]
    labels = ", num_labels=1" if adapter and reward else ""
    yield from ("```python", *imports, "")
    yield from (
        f'model = {auto}.from_pretrained("."{labels})',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        "```",
        "",
    )
    if adapter and quantization:
        yield "The adapter was trained on its base in 4 bits (NF4, double quantization, without the head): give "
        yield '`quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
        yield "bnb_4bit_use_double_quant=True)`; on the base in full precision the outputs differ a little."
        yield ""
    if adapter:
        yield "vLLM, with the base model that adapter_config.json names:"
        yield from ("", "```", "vllm serve <base model> --enable-lora --lora-modules trained=.", "```", "")
        yield "Ollama reads whole models: train with `adapter.export=merged`."
        return
    yield from ("vLLM:", "", "```", f"vllm serve .{' --runner pooling' if reward else ''}", "```", "")
    if reward:
        yield "The score of a response is the logit at its last token. Ollama generates text, so it has no use for it."
    else:
        yield from ("Ollama, for the architectures that it imports:", "", "```", "echo FROM . > Modelfile")
        yield from ("ollama create my-model", "ollama run my-model", "```")


def is_hub_data(name: Any) -> bool:
    """Return whether the name of a data source is one of the hub's, `owner/name`, and no file of this machine."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def subdict(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the dict at a key, an empty one where something else is there."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def text(value: Any) -> str:
    """Return `value` as a text on one line of Markdown, without markup."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(str(value)[:300].split()))
