"""Folders that hold a LoRA adapter, ours or from elsewhere: merged into the model they were trained on when opened."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from rlhf_lightning.errors import UserError
from rlhf_lightning.files import read_json
from rlhf_lightning.models.adapters import (
    BASE_QUANTIZATION,
    EXACT,
    check_quantization,
    four_bit,
    merge_in_place,
    probe,
    quiet_peft,
)
from rlhf_lightning.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from rlhf_lightning.models.peft import LoraConfig, get_peft_model, set_peft_model_state_dict

PREFIX = "base_model.model."
HONOURED = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out", "bias", "lora_bias",
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
)  # fmt: skip
"""Keys of adapter_config.json that decide the merged weights; which layers have LoRA is read from the weights."""
WITHOUT_EFFECT = (
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "init_lora_weights", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_tie", "target_modules_to_tie",
)  # fmt: skip


def adapter_weights(folder: str | Path) -> dict[str, Any]:
    """Return name -> tensor of an adapter's weights.

    Raises:
        UserError: no readable safetensors file; pickled weights are not opened.
    """
    file = Path(folder) / ADAPTER_WEIGHTS
    if not file.is_file():
        raise UserError(f"the adapter {folder} has no {ADAPTER_WEIGHTS}; other formats are not read")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0][:200]}") from error


def is_classifier_adapter(folder: str | Path) -> bool:
    """Return whether an adapter was trained on a sequence classifier."""
    settings = read_json(Path(folder) / ADAPTER_CONFIG)
    return isinstance(settings, dict) and settings.get("task_type") == "SEQ_CLS"


def saved_modules(folder: str | Path) -> set[str]:
    """Return the names of the weights that an adapter replaces whole, such as "score.weight"."""
    names = {name.removeprefix(PREFIX) for name in adapter_weights(folder)}
    return {name for name in names if ".lora_" not in name}


def check_ranks(folder: str | Path, settings: dict[str, Any], weights: dict[str, Any]) -> None:
    """Raise a UserError when ranks are larger than those of the weights, or names are patterns that take long.

    Layers of the ranks that the settings say are made before weights are put into them.
    """
    patterns = {key: settings.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, pattern in patterns.items():
        if not isinstance(pattern, dict) or not all(re.fullmatch(r"[\w.$^*\\-]{1,200}", name) for name in pattern):
            raise UserError(f"{folder}/{ADAPTER_CONFIG}: {key} must map names of layers to numbers")
    largest = max(
        (min(tensor.shape) for name, tensor in weights.items() if ".lora_" in name and tensor.ndim), default=0
    )
    for rank in (settings.get("r", 8), *patterns["rank_pattern"].values()):
        if largest and (not isinstance(rank, int) or rank > largest):
            raise UserError(
                f"{folder}/{ADAPTER_CONFIG}: the rank {str(rank)[:20]} is not that of its weights ({largest})"
            )


def merge_adapter(model: Any, folder: str | Path) -> Any:
    """Return `model`, which is used up, with the adapter of `folder` merged into its weights.

    Raises:
        UserError: another kind of adapter than LoRA, settings that are not honoured, or weights that do not fit.
    """
    settings, weights = read_json(Path(folder) / ADAPTER_CONFIG) or {}, adapter_weights(folder)
    kind, defaults = settings.get("peft_type"), LoraConfig().to_dict()
    if kind != "LORA":
        raise UserError(f"{folder} is an adapter of peft_type={kind}; only LORA is read")
    for key, value in settings.items():
        if key not in (*HONOURED, *WITHOUT_EFFECT) and value and value != defaults.get(key):
            raise UserError(f"{folder}/{ADAPTER_CONFIG}: {key}={str(value)[:80]} is not supported")
    check_ranks(folder, settings, weights)
    targets = sorted({name.removeprefix(PREFIX).partition(".lora_")[0] for name in weights if ".lora_" in name})
    misfit = f"the adapter {folder} does not fit the model {model.name_or_path}"
    quantization = (read_json(Path(folder) / "config.json") or {}).get(BASE_QUANTIZATION)
    if quantization is not None:  # the adapter was trained on the model with these weights
        check_quantization(f"{folder}/config.json: {BASE_QUANTIZATION}", quantization)
    try:
        if quantization is not None:
            four_bit().quantize(model, settings.get("modules_to_save") or ())
            four_bit().dequantize(model)
        # built from these keys only: others may make peft import modules that the file names
        config = LoraConfig(target_modules=targets, **{key: settings[key] for key in HONOURED if key in settings})
        with quiet_peft():
            wrapped = get_peft_model(model, config)
            loaded: Any = set_peft_model_state_dict(wrapped, weights)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{misfit}: {' '.join(str(error).split())[:200]}") from error
    lost = [key for key in loaded.missing_keys if ".lora_" in key or ".modules_to_save." in key]
    if lost or loaded.unexpected_keys:
        names = ", ".join(sorted(lost or loaded.unexpected_keys)[:3])
        raise UserError(f"{misfit}: {'it lacks' if lost else 'there is no place for'} {names}")
    expected = probe(wrapped) if model.dtype in EXACT else None
    merged = merge_in_place(wrapped)
    if expected is not None:
        gap = (probe(merged) - expected).abs().max().item()
        if not gap <= 1e-4 * max(1.0, expected.abs().max().item()):
            raise UserError(f"the adapter {folder} cannot be merged: outputs would differ by {gap:.2g}")
    return merged
