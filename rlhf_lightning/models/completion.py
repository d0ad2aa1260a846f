"""Hugging Face decoders that read completion groups: token log-probabilities, values and scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.attention import GROUP_SDPA, HALF, runs_mask
from rlhf_lightning.models.layers import bucketed, not_compiled
from rlhf_lightning.ops.groups import Group, GroupBatch, Layout, microbatches, pack
from rlhf_lightning.ops.logprobs import token_logprobs
from rlhf_lightning.ops.masking import group_attention_mask
from rlhf_lightning.ops.runs import find_runs

SHORTEST = 64


@dataclass
class CompletionOutput:
    """What a :class:`CompletionModel` returns for the N tokens in the loss mask of a batch; float32, each (N,)."""

    logprobs: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None


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


def hidden_states(model: nn.Module, batch: GroupBatch, by_runs: bool | None = None) -> Tensor:
    """Return the last hidden states (R * L, D) of the decoder below the head of `model`.

    Packed rows are read as one row without padding whose attention is computed by runs (`by_runs`), or with a dense
    mask. By default by runs, except where that is slower: on a CPU when a response with its share of the prompt has
    fewer than 64 tokens, on an accelerator in full precision, which varlen attention does not compute.
    """
    inner = unwrap(model)

    def read(ids: Tensor, positions: Tensor, attention: Tensor) -> Tensor:
        arguments: dict[str, Any] = {"position_ids": bucketed(inner, positions), "use_cache": False}
        output = inner.base_model(input_ids=bucketed(inner, ids), attention_mask=attention, **arguments)
        return output.last_hidden_state[:, : ids.shape[1]].flatten(0, 1)

    if batch.padded:
        return read(batch.input_ids, batch.position_ids, bucketed(inner, (batch.group_ids >= 0).long()))
    if by_runs is None:
        on_cpu = batch.input_ids.device.type == "cpu"  # checked first: counting tokens would synchronize an accelerator
        by_runs = batch.tokens >= SHORTEST * batch.sequences if on_cpu else computes_in(model) in HALF
    if by_runs and inner.config._attn_implementation == GROUP_SDPA:
        runs = batch.runs or find_runs(batch.group_ids, batch.response_ids)
        ids, positions = (x.flatten()[runs.real][None] for x in (batch.input_ids, batch.position_ids))
        hidden = read(ids, positions, runs_mask(runs, ids.device))
        return hidden.new_zeros(batch.input_ids.numel(), hidden.shape[-1]).index_copy(0, runs.real, hidden)
    groups, responses = bucketed(inner, batch.group_ids, -1), bucketed(inner, batch.response_ids)
    return read(batch.input_ids, batch.position_ids, group_attention_mask(groups, responses))


def scalars(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Return the float32 outputs of a head, (M,) of one, (M, H) of several; autocast would round to three digits."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(head.weight.dtype)).squeeze(-1).float()


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
            self.value_head = nn.Linear(config.hidden_size, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
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
        return CompletionOutput(logprobs, ent, value)

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
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: GroupBatch, at: Literal["last", "source"] = "last") -> Tensor:
        """Return normalized float32 scores (S,) at the last token of each response, or values (N,) at each state."""
        hidden = hidden_states(self.model, batch)
        inner = unwrap(self.model)
        states = hidden[batch.last if at == "last" else batch.source]
        scores = scalars(cast(nn.Linear, inner.score), states)
        mean, std = getattr(inner.config, "reward_mean", 0.0), getattr(inner.config, "reward_std", 1.0)
        if isinstance(mean, list):  # of each head
            mean, std = scores.new_tensor(mean), scores.new_tensor(std)
            return ((scores if scores.ndim == 2 else scores[:, None]) - mean) / std
        return (scores - mean) / std

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

    The check is a run, not a list of architectures: two random groups are read in both layouts and the hidden states
    that predict their responses must agree. Sliding windows, state spaces and position-free attention fail it.
    """
    inner = unwrap(model)
    config = inner.config.get_text_config()
    tokens = [(7 * i + 3) % config.vocab_size for i in range(24)]
    with not_compiled(inner):  # not worth compiling for lengths of a few tokens
        check_head(model, tokens[:8])
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or []
    if window and any("sliding" in str(kind) for kind in layers):
        return "padded", f"it has sliding-window attention ({window} tokens)"
    if window and getattr(config, "use_sliding_window", True) and not layers:
        return "padded", f"it has sliding-window attention ({window} tokens)"
    probes = [
        Group(tokens[:5], [tokens[5:9], tokens[9:12]]),
        Group(tokens[12:15], [tokens[15:20], tokens[20:22], tokens[22:24]]),
    ]
    training = model.training
    model.eval()

    def states(layout: Layout, by_runs: bool = False) -> Tensor:
        batch = pack(probes, layout=layout).to(inner.device)
        return hidden_states(model, batch, by_runs)[batch.source].float()

    def gap(by_runs: bool) -> float:
        return ((states("packed", by_runs) - padded).abs().max() / padded.abs().max().clamp_min(1e-6)).item()

    tolerance = 6e-2 if computes_in(model) in HALF else 1e-3
    failures = (TypeError, ValueError, RuntimeError, NotImplementedError)
    try:
        with torch.no_grad(), not_compiled(inner):
            padded = states("padded")
            if not gap(by_runs=False) <= tolerance:
                return "padded", "it ignores the group attention mask or the position ids"
            if inner.config._attn_implementation == GROUP_SDPA:
                try:
                    wrong = not gap(by_runs=True) <= tolerance
                except failures:
                    wrong = True
                if wrong:  # the dense mask is right
                    inner.set_attn_implementation("sdpa")
    except failures as error:
        return (
            "padded",
            f"it does not take a group attention mask ({type(error).__name__}: {str(error)[:120]})",
        )
    finally:
        model.train(training)
    return "packed", None
