"""The memory a training run needs per device, by part."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_lightning.ops.logprobs import MAX_LOGITS

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
BYTES_OF_4_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: its code, a scale of 8 bits per block of 64, and a scale of these per 256 (arXiv 2305.14314)."""
GB = 1e9
AUTO = "auto"
"""The value of `trainer.accumulate_grad_batches` with which a run splits its steps itself."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that decide its memory."""

    parameters: int
    lora: int  # parameters that LoRA of rank 1 would add
    hidden: int
    intermediate: int
    layers: int
    key_values: int  # width of the keys of a token, all heads together
    vocabulary: int
    whole: int = 0  # parameters of layers trained whole beside LoRA
    linear: int = 0  # parameters of the linear layers below the head, which may have 4 bits
    queries: int = 0  # width of the queries of a token, all heads together
    layer_weights: int = 0  # weights of the matrices of all layers


@dataclass(frozen=True)
class Job:
    """What of a configuration decides memory; the tokens are those of one forward pass on one device."""

    weight_bytes: int
    activation_bytes: int
    tokens: int
    loss_tokens: int
    cached_tokens: int = 0
    lora: int = 0
    moments: float = 2  # numbers of the size of a weight that the optimizer keeps for each
    checkpointing: bool = False
    shards: int = 1
    references: int = 0  # frozen copies of the policy
    rewards: int = 0  # reward models, about as large
    critic: bool = False
    four_bit: bool = False  # LoRA on weights of 4 bits
    offload: bool = False  # references and reward models are on the device only in the phase that needs them
    gathered: bool = False  # whole weights on every device while it samples


def bytes_per_token(shape: Shape, job: Job) -> tuple[float, float]:
    """Return the bytes of a token that a forward pass keeps for the backward pass, and those computed again there.

    Eager PyTorch saves about 13 D + 4 F values of a Llama layer (norms, queries, keys, values and their output, gate,
    up, and their product), and 4 D outside of the layers. Mixed precision keeps what the two norms compute in float32,
    4 D values more. With LoRA the norms are not trained, and 2 D values are not needed. With gradient checkpointing the
    input of each layer is kept, and one layer at a time is computed again.
    """
    mixed = job.activation_bytes < job.weight_bytes
    layer = ((13 + 4 * mixed) * shape.hidden + 4 * shape.intermediate) * job.activation_bytes
    layer -= 2 * shape.hidden * job.weight_bytes * (job.lora > 0)
    outside = 4 * shape.hidden * job.weight_bytes
    if job.checkpointing:
        return shape.layers * shape.hidden * job.weight_bytes + outside, layer
    return shape.layers * layer + outside, 0.0


def trained_parameters(shape: Shape, job: Job) -> int:
    """Return the parameters of the policy that have gradients."""
    return shape.lora * job.lora + shape.whole if job.lora else shape.parameters


def estimate(shape: Shape, job: Job) -> dict[str, float]:
    """Return the bytes needed per device, by part; with `offload` those of the phase of an iteration that needs most.

    Mixed precision keeps a copy of the weights, but not of sharded ones, of 4-bit ones, and of those under LoRA with
    gradient checkpointing, of which a layer is converted at a time. A critic that is a model is trained whole, also
    beside a policy with LoRA. In the backward pass the logits are gone when the first layer is computed again.
    """
    mixed = job.activation_bytes < job.weight_bytes
    converted = mixed * job.activation_bytes if job.shards == 1 else 0
    whole = job.weight_bytes / job.shards + converted
    weights, trained = shape.parameters * whole, trained_parameters(shape, job)
    if job.lora:
        each = job.weight_bytes / job.shards + (0 if job.checkpointing else converted)
        weights = (shape.parameters + shape.whole) * each
        if job.four_bit:
            weights -= shape.linear * (each - BYTES_OF_4_BITS)
    if job.critic:
        weights, trained = weights + shape.parameters * whole, trained + shape.parameters
    chunk = min(job.loss_tokens, max(MAX_LOGITS // shape.vocabulary, 1)) if job.loss_tokens else 0
    logits = chunk * shape.vocabulary * 4
    model = shape.parameters * job.weight_bytes
    optimizer = trained * job.weight_bytes * job.moments / job.shards
    always = {"weights": weights, "optimizer": optimizer}
    saved, again = (job.tokens * size for size in bytes_per_token(shape, job))
    update = {
        "gradients": trained * job.weight_bytes / job.shards,
        "activations": saved + (again if again > 3 * logits else 0),
        "logits": 0 if again > 3 * logits else 3 * logits,
    }
    sampling = {
        "gathered weights": job.gathered * shape.parameters * job.activation_bytes,
        "key-value cache": job.cached_tokens * 2 * shape.key_values * shape.layers * job.weight_bytes,
    }
    scoring, reference = job.rewards * model, job.references * model / job.shards
    if not job.offload:
        return always | {"frozen models": scoring + reference} | update | sampling
    log_probs = {"frozen models": reference, "logits": logits}
    phases = (update, sampling, {"frozen models": scoring}, log_probs)
    return always | max(phases, key=lambda parts: sum(parts.values()))
