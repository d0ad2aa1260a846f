"""LoRA through peft: add, switch off (the reference policy), and what is exported, merged weights or the adapter.

With `quantization` the weights under it have 4 bits (QLoRA), see :mod:`rlhf_lightning.models.four_bit`.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.models.deferred import deferred, placeholders
from rlhf_lightning.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from rlhf_lightning.models.peft import BaseTunerLayer, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

log = logging.getLogger(__name__)
EXPORTS = ("merged", "adapter")
QUANTIZATIONS = ("nf4",)
BASE_QUANTIZATION = "base_quantization"
"""Key in the config.json of an adapter whose model was quantized."""
EXACT = (torch.float32, torch.float64)


def add_lora(
    model: PreTrainedModel,
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    use_rslora: bool = False,
    modules_to_save: Sequence[str] | None = None,
    export: str = "merged",
    quantization: str | None = None,
) -> PeftModel:
    """Return `model` with LoRA layers (arXiv 2106.09685); a `score` head stays fully trainable.

    Args:
        r: rank of the update.
        alpha: the update is scaled by alpha / r (alpha / sqrt(r) with `use_rslora`).
        target_modules: names of linear or embedding layers, or "all-linear" for all linear ones but the head.
        modules_to_save: names of layers that are trained whole, in copies beside LoRA.
        export: what :func:`export_lora` makes of it: "merged" or "adapter".
        quantization: "nf4" puts the weights of the linear layers but the head into 4 bits (QLoRA, arXiv 2305.14314).

    Raises:
        UserError: a rank below one, or no layer of the names in `target_modules` or `modules_to_save`.
    """
    if export not in EXPORTS:
        raise UserError(f"adapter.export={export!r} is not one of {', '.join(EXPORTS)}.{nearest(export, EXPORTS)}")
    if quantization is not None:
        check_quantization("adapter.quantization", quantization)
    has_score = isinstance(getattr(model, "score", None), nn.Linear)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    layers = {part for name, _ in model.named_modules() for part in (name, name.rpartition(".")[2])}
    for name in modules_to_save or ():
        if name not in layers:
            raise UserError(f"adapter.modules_to_save: the model has no layer {name}.{nearest(name, layers)}")
    if quantization:
        four_bit().quantize(model, modules_to_save or ())
    try:
        config = LoraConfig(
            # not SEQ_CLS: peft would train a copy of the head, which is lost on save and merge
            task_type=None if has_score else "CAUSAL_LM",
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=targets,
            use_rslora=use_rslora,
            modules_to_save=list(modules_to_save) if modules_to_save else None,
            exclude_modules=["score"] if has_score else None,
        )
        with quiet_peft():
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"adapter: {error}") from error
    if has_score:
        model.score.requires_grad_(True)  # type: ignore[union-attr, operator]
    wrapped.adapter_export = export  # type: ignore[assignment]
    return wrapped  # type: ignore[return-value]


def load_model(load: Callable[[], Any], lora: dict[str, Any] | None = None, defer: bool = False) -> Any:
    """Return the model of `load`, with LoRA layers where `lora` has arguments of :func:`add_lora`.

    Weights are quantized on the CPU: on an accelerator, the default device of Lightning, they may not fit before.

    Args:
        defer: its weights may be read later, by :func:`rlhf_lightning.models.deferred.read_weights`; not those of
            layers that `modules_to_save` copies.

    Raises:
        UserError: quantized weights that are to be sharded.
    """
    if lora is not None and lora.get("quantization"):
        if defer:
            raise UserError("adapter=qlora cannot be sharded; use strategy=ddp, or adapter=lora")
        with torch.device("cpu"):
            model = add_lora(load(), **lora)
        return model.to(torch.get_default_device())
    with deferred(defer and not (lora or {}).get("modules_to_save")):
        model = load()
    if lora is None:
        return model
    with placeholders(model):
        return add_lora(model, **lora)


def check_quantization(key: str, value: Any) -> None:
    """Raise a UserError for another value of `key` than a format of quantized weights."""
    if value not in QUANTIZATIONS:
        raise UserError(f"{key}={value!r} is not one of {', '.join(QUANTIZATIONS)}.{nearest(value, QUANTIZATIONS)}")


def four_bit() -> Any:
    """Import and return :mod:`rlhf_lightning.models.four_bit`, which needs the extra `qlora`."""
    from rlhf_lightning.models import four_bit

    return four_bit


def is_quantized(model: nn.Module) -> bool:
    """Return whether a model, or that under its LoRA, has weights of 4 bits."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return bool(getattr(inner, "is_loaded_in_4bit", False))


def quantizable(model: Any, keep: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """Return name -> layer of the linear layers below the head of a model, without those that `keep` names."""
    decoder, head = model.base_model, model.get_output_embeddings()
    within = {id(module) for module in decoder.modules() if module is not head}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in within and not {name, name.rpartition(".")[2]} & {*keep}
    }


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence peft's advice: tied weights are handled here, and it reads a property that transformers 5.24 renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        warnings.filterwarnings("ignore", ".*tie_word_embeddings.*|.*embeddings are no longer tied.*")
        yield


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Run with LoRA switched off; without LoRA it does nothing."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    else:
        yield


def export_lora(model: nn.Module) -> Any:
    """Return what is saved of a trained model: a merged copy of a LoRA model, its adapter, or the model itself.

    The adapter is returned where it is asked for (`adapter.export`) and where merging would not give the trained
    model: half precision rounds the update away, and a layer that does not merge shows in the outputs.
    """
    if not isinstance(model, PeftModel):
        return model
    if getattr(model, "adapter_export", "merged") == "adapter":
        return Adapter(model)
    dtype = model.get_base_model().dtype
    if dtype not in EXACT:
        reason = f"merging into weights of {str(dtype).removeprefix('torch.')} would round the update"
    else:
        if is_quantized(model):  # the weights of the merged model may not fit where those of 4 bits do
            model = copy.deepcopy(model).cpu()
        expected, merged = probe(model), merge_lora(model)
        gap = (probe(merged) - expected).abs().max().item()
        if gap <= 1e-4 * max(1.0, expected.abs().max().item()):
            return merged
        reason = f"its outputs differ by {gap:.2g} when it is merged"
    log.warning("the adapter is exported, not merged weights: %s (adapter.export=adapter)", reason)
    return Adapter(model)


class Adapter:
    """A LoRA model of which :meth:`save_pretrained` writes the adapter, as peft does, and the model's config."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.inner: Any = model.get_base_model()

    @property
    def config(self) -> Any:
        """The config of the model."""
        return self.inner.config

    @property
    def generation_config(self) -> Any:
        """The generation config of the model, None where it has none."""
        return getattr(self.inner, "generation_config", None)

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write adapter_config.json, adapter_model.safetensors and the configs of the model.

        A `score` head is trained itself, not in a copy as peft would, and is written as one of `modules_to_save`.
        """
        folder, name = Path(folder), str(self.model.active_adapter)
        state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        settings: dict[str, Any] = self.model.peft_config[name].to_dict() | {"inference_mode": True}
        head = getattr(self.inner, "score", None)
        if isinstance(head, nn.Linear):
            state |= {f"base_model.model.score.{key}": value for key, value in head.state_dict().items()}
            settings |= {"modules_to_save": [*(settings["modules_to_save"] or []), "score"], "task_type": "SEQ_CLS"}
        save_file({key: value.detach().cpu().clone() for key, value in state.items()}, folder / ADAPTER_WEIGHTS)
        lists = {key: sorted(value) for key, value in settings.items() if isinstance(value, set)}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(settings | lists, indent=2, default=str), encoding="utf-8")
        config = copy.deepcopy(self.config)
        config.architectures = [type(self.inner).__name__]
        if is_quantized(self.model):
            setattr(config, BASE_QUANTIZATION, QUANTIZATIONS[0])
        config.save_pretrained(folder)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(folder)


def merge_lora(model: nn.Module) -> Any:
    """Return a plain Hugging Face model for saving: a merged copy of a LoRA model, or the model itself."""
    return merge_in_place(copy.deepcopy(model)) if isinstance(model, PeftModel) else model


def merge_in_place(model: PeftModel) -> Any:
    """Return the plain model that a LoRA model becomes; `model` is used up.

    Embedding and head that share their weights get weights of their own where LoRA changes one of them: in training
    only the layer with LoRA changes. Weights of 4 bits are de-quantized, not rounded again with the update.
    """
    if is_quantized(model):
        four_bit().dequantize(model)
    adapted = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    bases: list[Any] = [layer.get_base_layer() for layer in adapted]
    places: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                places[id(parameter)] = places.get(id(parameter), 0) + 1
    shared = [base for base in bases if places.get(id(getattr(base, "weight", None)), 0) > 1]
    for base in shared:
        base.weight = nn.Parameter(base.weight.detach().clone())
    with quiet_peft():
        plain: Any = model.merge_and_unload()
    if shared:
        for config in {id(c): c for c in (plain.config, plain.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    return plain


@torch.no_grad()
def probe(model: nn.Module) -> Tensor:
    """Return the outputs of a model, in evaluation mode, for a few token ids; the last is the highest."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    highest = inner.get_input_embeddings().weight.shape[0] - 1
    ids = torch.tensor([[(7 * i + 3) % (highest + 1) for i in range(23)] + [highest]], device=inner.device)
    training = model.training
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits.float()
    model.train(training)
    return logits
