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


def bytes_per_token(shape: Shape, job: Job) -> float:
    """Return the bytes of activations that a token of a forward pass keeps for the backward pass.

    Eager PyTorch saves about 13 D + 4 F values of a Llama layer (norms, queries, keys, values and their output, gate,
    up, and their product), one D with recomputation. Mixed precision keeps what the two norms compute in float32, 4 D
    values more.
    """
    mixed = job.activation_bytes < job.weight_bytes
    layer = (13 + 4 * mixed) * shape.hidden + 4 * shape.intermediate
    saved = (shape.hidden * shape.layers + layer) if job.checkpointing else layer * shape.layers
    return saved * job.activation_bytes


def estimate(shape: Shape, job: Job) -> dict[str, float]:
    """Return the bytes needed per device, by part.

    Mixed precision keeps a copy of the weights, not with LoRA, and not of sharded ones, of which a layer is converted
    at a time.
    """
    trained = shape.lora * job.lora + shape.whole if job.lora else shape.parameters
    copies = shape.whole if job.lora else 0
    models = 2 if job.critic else 1
    mixed = job.activation_bytes < job.weight_bytes
    converted = mixed * job.activation_bytes if job.shards == 1 and not job.lora else 0
    chunk = min(job.loss_tokens, max(MAX_LOGITS // shape.vocabulary, 1)) if job.loss_tokens else 0
    return {
        "weights": models * (shape.parameters + copies) * (job.weight_bytes / job.shards + converted),
        "gradients": models * trained * job.weight_bytes / job.shards,
        "optimizer": models * trained * job.weight_bytes * job.moments / job.shards,
        "frozen models": (job.references / job.shards + job.rewards) * shape.parameters * job.weight_bytes,
        "activations": job.tokens * bytes_per_token(shape, job),
        "logits": 3 * chunk * shape.vocabulary * 4,
        "key-value cache": job.cached_tokens * 2 * shape.key_values * shape.layers * job.weight_bytes,
    }
