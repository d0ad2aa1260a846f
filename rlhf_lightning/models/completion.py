"""Hugging Face decoders that read completion groups: token log-probabilities, values and scores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.attention import (
    GROUP_SDPA,
    HALF,
    PATHS,
    Path,
    dense_mask,
    possible_paths,
    runs_mask,
    window_of,
)
from rlhf_lightning.models.flex import padded_length
from rlhf_lightning.models.layers import bucketed, not_compiled
from rlhf_lightning.ops.groups import Group, GroupBatch, Layout, microbatches, pack
from rlhf_lightning.ops.logprobs import token_logprobs
from rlhf_lightning.ops.runs import find_runs

log = logging.getLogger(__name__)
SHORTEST = 64
_CHOSEN: dict[tuple[Any, ...], Path] = {}
"""Attention paths that :func:`choose_layout` found right; a reference takes that of its policy, which has its shape."""


@dataclass
class CompletionOutput:
    """What a :class:`CompletionModel` returns for the N tokens in the loss mask of a batch; float32, each (N,).

    `states` (N, D) are the hidden states that the values are of, in the precision of the model.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None
    states: Tensor | None = None


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model inside a peft wrapper, or the model itself."""
    return cast(PreTrainedModel, model.get_base_model() if hasattr(model, "get_base_model") else model)  # type: ignore[operator]


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of token ids that a model has an embedding for."""
    return cast(nn.Embedding, unwrap(model).get_input_embeddings()).weight.shape[0]


def computes_in(model: nn.Module) -> torch.dtype:
    """Return the precision of a model's matrix products: that of its weights, or of autocast around the call."""
    inner = unwrap(model)
    if torch.is_autocast_enabled(inner.device.type):
        return torch.get_autocast_dtype(inner.device.type)
    return inner.dtype


def attention_path(model: nn.Module, batch: GroupBatch) -> Path:
    """Return how the attention of a packed batch is computed: as :func:`choose_layout` found right for the model.

    Where it was not asked, on this device and in this precision, the first of :func:`possible_paths`. On a CPU the
    dense mask is faster when a response with its share of the prompt has fewer than 64 tokens.
    """
    inner, device = unwrap(model), batch.input_ids.device.type
    if inner.config._attn_implementation != GROUP_SDPA:
        return "dense"
    if device == "cpu" and batch.tokens < SHORTEST * batch.sequences:  # counted on a CPU: elsewhere it would wait
        return "dense"
    chosen = _CHOSEN.get(_shape(model, device))
    return chosen or possible_paths(inner.config.get_text_config(), device, computes_in(model))[0]


def _shape(model: nn.Module, device: str) -> tuple[Any, ...]:
    """Return what decides whether a kernel computes the attention of a model."""
    inner = unwrap(model)
    config = inner.config.get_text_config()
    sizes = (getattr(config, name, None) for name in ("hidden_size", "head_dim", "num_attention_heads"))
    return type(inner.base_model), *sizes, device, computes_in(model)


def hidden_states(model: nn.Module, batch: GroupBatch, path: Path | None = None) -> Tensor:
    """Return the last hidden states (R * L, D) of the decoder below the head of `model`.

    Packed rows are read as one row without padding, or with a dense mask as they are; by default as
    :func:`attention_path` says. Nothing here waits for the device.
    """
    inner = unwrap(model)

    def read(ids: Tensor, positions: Tensor, attention: Tensor) -> Tensor:
        arguments: dict[str, Any] = {"position_ids": bucketed(inner, positions), "use_cache": False}
        output = inner.base_model(input_ids=bucketed(inner, ids), attention_mask=attention, **arguments)
        return output.last_hidden_state[:, : ids.shape[1]].flatten(0, 1)

    if batch.padded:
        return read(batch.input_ids, batch.position_ids, bucketed(inner, (batch.group_ids >= 0).long()))
    path, window = path or attention_path(model, batch), window_of(inner.config.get_text_config())
    if path == "dense":
        window = batch.runs.within(window) if batch.runs else window
        responses, places = (bucketed(inner, x) for x in (batch.response_ids, batch.position_ids))
        mask = dense_mask(bucketed(inner, batch.group_ids, -1), responses, places, window)
        return read(batch.input_ids, batch.position_ids, mask)
    runs = batch.runs or find_runs(batch.group_ids, batch.response_ids)
    ids, positions = (x.flatten()[runs.real][None] for x in (batch.input_ids, batch.position_ids))
    if path == "flex":
        more = (0, padded_length(ids.shape[1]) - ids.shape[1])
        ids, positions = pad(ids, more), pad(positions, more)
    hidden = read(ids, positions, runs_mask(runs, ids.device, path, window))[: len(runs.real)]
    return hidden.new_zeros(batch.input_ids.numel(), hidden.shape[-1]).index_copy(0, runs.real, hidden)


def scalars(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Return the float32 outputs of a head, (M,) of one, (M, H) of several; autocast would round to three digits."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(head.weight.dtype)).squeeze(-1).float()


def zero_head(size: int) -> nn.Linear:
    """Return a value head that starts at zero, Linear(size, 1)."""
    head = nn.Linear(size, 1)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


class CompletionModel(nn.Module):
    """A causal language model over completion groups, with an optional value head on the same trunk.

    Args:
        lm: a Hugging Face causal LM, or a peft model around one.
        value_head: adds a zero-initialised Linear(D, 1) that values the state before each token.
    """

    def __init__(self, lm: nn.Module, value_head: bool = False) -> None:
        super().__init__()
        self.lm = lm
        config = unwrap(lm).config.get_text_config()
        self.value_head: nn.Linear | None = None
        if value_head:
            self.value_head = zero_head(config.hidden_size)
        # logit scales and soft caps, which some architectures apply after the head
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.logit_scale = getattr(config, "logit_scale", None) or 1.0
        if scaling := getattr(config, "logits_scaling", None):
            self.logit_scale = 1.0 / scaling

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits (M, V) of hidden states (M, D)."""
        logits = cast(nn.Module, unwrap(self.lm).get_output_embeddings())(hidden)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def forward(
        self,
        batch: GroupBatch,
        temperature: float = 1.0,
        entropy: bool = False,
        values: bool = False,
        entropy_gradient: bool = True,
    ) -> CompletionOutput:
        """Return log-probabilities (and entropy, values) of the tokens in the loss mask; the head runs nowhere else."""
        hidden = hidden_states(self.lm, batch)[batch.source]
        logprobs, ent = token_logprobs(
            hidden, self.head, batch.targets, temperature, entropy, entropy_gradient=entropy_gradient
        )
        value = None
        if values:
            if self.value_head is None:
                raise ValueError("values were requested from a model without a value head")
            value = scalars(self.value_head, hidden).clone()  # FSDP2 warns of outputs that are views
        return CompletionOutput(logprobs, ent, value, hidden if values else None)

    @property
    def decoder(self) -> nn.Module:
        """The Hugging Face model inside."""
        return self.lm

    def decode(self, **inputs: Any) -> Any:
        """Return the language model's forward output; a sharded one gathers its weights here."""
        return self.lm(**inputs)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(*args)`; a sharded model gathers its weights here."""
        return function(*args)


class ScalarModel(nn.Module):
    """A sequence classifier over completion groups: a reward model or a critic.

    Args:
        model: `AutoModelForSequenceClassification` with a linear `score` head, or a peft model around one; with H > 1
            labels, of a head per group of annotators, its outputs have a second dimension (H,).
        value_head: puts a zero-initialised Linear(D, 1) in the place of the `score` head, for a critic.
    """

    def __init__(self, model: nn.Module, value_head: bool = False) -> None:
        super().__init__()
        self.model = model
        self.value_head: nn.Linear | None = None
        if value_head:
            self.value_head = zero_head(unwrap(model).config.get_text_config().hidden_size)
            unwrap(model).score = nn.Identity()  # parameters that no loss reaches would stop DDP

    def forward(self, batch: GroupBatch, at: Literal["last", "source"] = "last") -> Tensor:
        """Return normalized float32 scores (S,) at the last token of each response, or values (N,) at each state."""
        return self.outputs(batch, at)[0]

    def outputs(self, batch: GroupBatch, at: Literal["last", "source"]) -> tuple[Tensor, Tensor]:
        """Return what :meth:`forward` does, and the hidden states (S or N, D) that it is of."""
        hidden = hidden_states(self.model, batch)
        inner = unwrap(self.model)
        states = hidden[batch.last if at == "last" else batch.source]
        if self.value_head is not None:
            return scalars(self.value_head, states), states
        scores = scalars(cast(nn.Linear, inner.score), states)
        mean, std = getattr(inner.config, "reward_mean", 0.0), getattr(inner.config, "reward_std", 1.0)
        if isinstance(mean, list):  # of each head
            mean, std = scores.new_tensor(mean), scores.new_tensor(std)
            return ((scores if scores.ndim == 2 else scores[:, None]) - mean) / std, states
        return (scores - mean) / std, states

    @property
    def decoder(self) -> nn.Module:
        """The Hugging Face model inside."""
        return self.model

    def decode(self, **inputs: Any) -> Any:
        """Return the classifier's forward output; a sharded one gathers its weights here."""
        return self.model(**inputs)

    run = CompletionModel.run


@torch.no_grad()
def response_logprobs(
    model: Callable[..., CompletionOutput],
    groups: Sequence[Group],
    layout: Layout,
    device: torch.device | str,
    temperature: float = 1.0,
    tokens: int = 8192,
    progress: Callable[[int], Any] | None = None,
) -> list[list[Tensor]]:
    """Return the log-probabilities (float32, on the CPU) of each response's tokens in the loss mask, group by group.

    Args:
        model: a :class:`CompletionModel`, frozen or not, in the mode (eval or train) it should compute in.
        tokens: per forward pass; changes memory, not results.
        progress: called with the number of groups after each forward pass.
    """
    result: list[list[Tensor]] = [[] for _ in groups]
    for places, batch in microbatches(groups, tokens, layout):
        lengths = batch.lengths.tolist()
        parts = iter(model(batch.to(device), temperature).logprobs.float().cpu().split(lengths))
        for place in places:
            result[place] = [next(parts) for _ in groups[place].responses]
        if progress:
            progress(len(places))
    return result


@torch.no_grad()
def check_head(model: nn.Module, tokens: list[int]) -> None:
    """Raise a UserError when a model's logits differ from :meth:`CompletionModel.head` of its hidden states."""
    inner = unwrap(model)
    if inner.get_output_embeddings() is None:
        return
    training = model.training
    model.eval()
    batch = pack([Group(tokens[:1], [tokens[1:]])], layout="padded").to(inner.device)
    expected = inner(input_ids=batch.input_ids, use_cache=False).logits[0].float().log_softmax(-1)
    logprobs = CompletionModel(model).head(hidden_states(model, batch)).float().log_softmax(-1)
    model.train(training)
    gap = (logprobs - expected).abs().max().item()
    if gap > (0.2 if computes_in(model) in HALF else 1e-3):
        raise UserError(
            f"{type(inner).__name__} computes its logits in a way that is not supported: log-probabilities would be "
            f"wrong by {gap:.2g}"
        )


def choose_layout(model: nn.Module) -> tuple[Layout, str | None]:
    """Return the layout `model` computes correctly, and why not "packed" when it is "padded".

    The check is a run, not a list of architectures: two random groups are read in both layouts, under a sliding window
    that is shorter than they are, and the hidden states that predict their responses must agree. State spaces and
    position-free attention fail it. Attention takes the first of :func:`possible_paths` that agrees and, of a model in
    training, has a backward pass; the log says which.
    """
    layout, reason = _probe(model)
    log.info("attention of %s: %s", type(unwrap(model)).__name__, describe_attention(model, layout))
    return layout, reason


def _probe(model: nn.Module) -> tuple[Layout, str | None]:
    inner = unwrap(model)
    config = inner.config.get_text_config()
    tokens = [(7 * i + 3) % config.vocab_size for i in range(24)]
    with not_compiled(inner):  # not worth compiling for lengths of a few tokens
        check_head(model, tokens[:8])
    ours, window = inner.config._attn_implementation == GROUP_SDPA, window_of(config)
    if window and not ours:
        return "padded", f"it has sliding-window attention ({window} tokens)"
    if any("chunked" in str(kind) for kind in getattr(config, "layer_types", None) or []):
        return "padded", "it has chunked attention"
    probes = [
        Group(tokens[:5], [tokens[5:9], tokens[9:12]]),
        Group(tokens[12:15], [tokens[15:20], tokens[20:22], tokens[22:24]]),
    ]
    tolerance = 6e-2 if computes_in(model) in HALF else 1e-3
    parameters = list(model.parameters())
    # a backward pass here, inside a forward pass of a sharded model, would reduce gradients
    trains = model.training and not any(isinstance(p, DTensor) for p in parameters)
    learned = next((p for p in parameters if p.requires_grad), None) if trains else None
    training = model.training
    model.eval()

    def states(layout: Layout, path: Path = "dense", times: int = 1) -> Tensor:
        batch = pack(probes * times, layout=layout).to(inner.device)
        with nullcontext() if path == "flex" else not_compiled(inner):  # which would not compile FlexAttention either
            return hidden_states(model, batch, path)[batch.source].float()

    def agrees(path: Path) -> bool:
        gap = (states("packed", path) - padded).abs().max() / padded.abs().max().clamp_min(1e-6)
        return gap.item() <= tolerance

    try:
        with torch.no_grad(), short_window(model, config):
            padded = states("padded")
            if not agrees("dense"):
                return "padded", "it ignores the group attention mask or the position ids"
            paths = possible_paths(config, inner.device.type, computes_in(model)) if ours else []
            for path in paths:
                try:
                    if path != "dense" and not agrees(path):
                        continue
                    if path in ("varlen", "flex"):  # kernels may be there for the forward pass, or a length, only
                        with torch.set_grad_enabled(learned is not None):
                            total = states("packed", path, 16).sum()
                        if learned is not None and total.requires_grad:
                            torch.autograd.grad(total, learned, allow_unused=True)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # a compiler may raise anything
                    log.info("attention of %s is not computed by %s: %s", type(inner).__name__, path, error)
                    continue
                _CHOSEN[_shape(model, inner.device.type)] = path
                break
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return (
            "padded",
            f"it does not take a group attention mask ({type(error).__name__}: {str(error)[:120]})",
        )
    finally:
        model.train(training)
    return "packed", None


@contextmanager
def short_window(model: nn.Module, config: Any, tokens: int = 4) -> Iterator[None]:
    """Let sliding-window layers see `tokens` tokens, so that short rows tell whether their window is respected."""
    window = window_of(config)
    owners: list[Any] = [
        x for x in (config, *model.modules()) if window and getattr(x, "sliding_window", None) == window
    ]
    for owner in owners:
        owner.sliding_window = tokens
    try:
        yield
    finally:
        for owner in owners:
            owner.sliding_window = window


def describe_attention(model: nn.Module, layout: Layout = "packed") -> str:
    """Return how attention is computed in a layout that :func:`choose_layout` found right, for the log."""
    inner = unwrap(model)
    if layout == "padded":
        return f"one padded row per response ({inner.config._attn_implementation})"
    dtype = computes_in(model)
    path = _CHOSEN.get(_shape(model, inner.device.type), "dense")
    window = window_of(inner.config.get_text_config())
    more = f", in a sliding window of {window} tokens" if window else ""
    return f"{PATHS[path]} ({str(dtype).removeprefix('torch.')} on {inner.device.type}){more}"
