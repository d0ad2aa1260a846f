"""The time that an optimizer step needs on N devices, by part: floating-point operations, bytes read, bytes sent.

Compute is counted in floating-point operations at a share of the peak (MFU), decoding in bytes read at a share of the
memory bandwidth, communication in bytes sent at a share of the bandwidth of the links; latencies, the rest of memory
traffic and waiting for the slowest device are in those shares. The accounting is that of arXiv 2104.04473 (section
3.2 and appendix) and of jax-ml.github.io/scaling-book.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_lightning.runtime.memory import GB, Job, Shape, trained_parameters


@dataclass(frozen=True)
class Hardware:
    """A device and its links; bandwidths are per device and in one direction.

    Args:
        tflops: peak of dense bfloat16 in 1e12 operations per second.
        memory_gb_s: bandwidth of the device's memory.
        intra_node_gb_s, inter_node_gb_s: bandwidth to devices of the same node, and of other nodes.
        mfu: share of `tflops` that forward and backward passes reach without communication.
        mbu: share of `memory_gb_s` that decoding and the optimizer reach.
        link_efficiency: share of the bandwidths of the links that collectives reach.
    """

    name: str
    tflops: float
    memory_gb: float
    memory_gb_s: float
    intra_node_gb_s: float
    inter_node_gb_s: float
    mfu: float
    mbu: float
    link_efficiency: float


@dataclass(frozen=True)
class Step:
    """What one device computes in an optimizer step, of online stages in an iteration; its rows at full length.

    Args:
        tokens: of all microbatches; loss_tokens: those whose logits are computed.
        pairs: pairs of tokens that attend to each other.
        epochs: passes over the tokens; updates: of the optimizer, in all epochs.
        forwards: forward passes without a backward one: reference, reward models, log-probs of the rollout, critic.
        sequences, prompts, prompt_tokens, new_tokens: what is sampled; lengths are those of one sequence.
        decode_batches: of the sampled sequences; gather_sampling: sharded weights are gathered once for all of them.
        devices, nodes: devices of a node, and nodes.
        tensor_parallel: devices that share every layer and the rows.
    """

    tokens: int
    loss_tokens: int
    pairs: float
    microbatches: int = 1
    epochs: int = 1
    updates: int = 1
    forwards: int = 0
    sequences: int = 0
    prompts: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    decode_batches: int = 1
    gather_sampling: bool = False
    devices: int = 1
    nodes: int = 1
    tensor_parallel: int = 1


def forward_flops(shape: Shape, tokens: float, loss_tokens: float, pairs: float, tensor_parallel: int = 1) -> float:
    """Return the operations of a forward pass on one device: (2 N T + 4 Q L P) / tp + 2 V D T_loss.

    N weights of the matrices of L layers, width Q of the queries, P pairs of tokens that attend, T_loss tokens in the
    loss mask of a vocabulary V. Tensor parallelism here does not split the embeddings.
    """
    layers = 2 * shape.layer_weights * tokens + 4 * shape.queries * shape.layers * pairs
    return layers / tensor_parallel + 2 * shape.vocabulary * shape.hidden * loss_tokens


def passes(job: Job) -> int:
    """Return the operations of forward and backward, in forward passes.

    3 (6 N T); a frozen base needs no gradients of its weights: 2; checkpointing computes the forward pass again
    (arXiv 2104.04473, equation 3: 4).
    """
    return (2 if job.lora else 3) + job.checkpointing


def gather_seconds(size: float, devices: int, nodes: int, hardware: Hardware) -> float:
    """Return the seconds of an all-gather (or reduce-scatter) of `size` bytes over nodes of `devices` each.

    (g-1)/g size / intra + (m-1)/m size / (g inter): between nodes every device exchanges its part only, then the
    nodes gather within. On one node this is the ring's bound (n-1)/n size / bandwidth (Patarasuk and Yuan 2009).
    """
    within = (devices - 1) / devices * size / hardware.intra_node_gb_s
    between = (nodes - 1) / nodes * size / devices / hardware.inter_node_gb_s
    return (within + between) / (GB * hardware.link_efficiency)


def all_reduce_seconds(size: float, devices: int, nodes: int, hardware: Hardware) -> float:
    """Return the seconds of an all-reduce: a reduce-scatter and an all-gather, 2 (n-1)/n size / bandwidth."""
    return 2 * gather_seconds(size, devices, nodes, hardware)


def decode_bytes(shape: Shape, job: Job, sequences: float, context: float, tensor_parallel: int = 1) -> float:
    """Return the bytes that one token of each of `sequences` reads: all weights, and keys and values of `context`.

    Autocast reads weights in their own precision, writes them in half, and reads that; sharded ones are gathered in
    half.
    """
    mixed = job.activation_bytes < job.weight_bytes and job.shards == 1
    weight = job.weight_bytes + 2 * job.activation_bytes if mixed else job.activation_bytes
    cache = 2 * shape.key_values * shape.layers * job.activation_bytes * context
    layers = shape.layer_weights * weight + sequences * cache
    return layers / tensor_parallel + shape.vocabulary * shape.hidden * weight


def step_seconds(shape: Shape, job: Job, step: Step, hardware: Hardware) -> dict[str, float]:
    """Return the seconds of each part of a step, none of them hidden behind another.

    Sharded weights are gathered for the forward and for the backward pass of every microbatch, those of layers in the
    precision of the computation, and gradients reduced after it in their own (arXiv 2304.11277); frozen models and
    every sampled token gather once more. Tensor parallelism reduces the activations of a layer twice forward and twice
    backward (arXiv 1909.08053).
    """
    tp, rate = step.tensor_parallel, hardware.tflops * 1e12 * hardware.mfu
    bandwidth = hardware.memory_gb_s * GB * hardware.mbu
    forward = forward_flops(shape, step.tokens, step.loss_tokens, step.pairs, tp)
    models = 2 if job.critic else 1
    trained = trained_parameters(shape, job)
    moved = trained * job.weight_bytes * (3 + 2 * job.moments)  # read all four, write weights and moments
    parts = {
        "forward and backward": step.epochs * models * passes(job) * forward / rate,
        "forward of frozen models and log-probs": step.forwards * forward / rate,
        "optimizer": step.updates * models * moved / job.shards / bandwidth,
    }
    if step.sequences:
        attended = step.prompts * step.prompt_tokens**2 / 2
        prefill = forward_flops(shape, step.prompts * step.prompt_tokens, step.prompts, attended, tp)
        context = step.prompt_tokens + step.new_tokens / 2
        token = decode_bytes(shape, job, step.sequences / step.decode_batches, context, tp) / bandwidth
        parts |= {"prefill": prefill / rate, "decoding": step.decode_batches * step.new_tokens * token}
    return parts | communication_seconds(shape, job, step, hardware)


def communication_seconds(shape: Shape, job: Job, step: Step, hardware: Hardware) -> dict[str, float]:
    """Return the seconds of the collectives of a step, by kind."""
    tp, ranks = step.tensor_parallel, step.devices * step.nodes
    within, between = min(tp, step.devices), max(tp // step.devices, 1)  # of a tensor-parallel group
    devices, nodes = step.devices // within, step.nodes // between
    models = 2 if job.critic else 1
    gradients = models * trained_parameters(shape, job) * job.weight_bytes / tp
    others = shape.parameters - shape.layer_weights
    weights = (shape.layer_weights * job.activation_bytes + others * job.weight_bytes) / tp
    parts: dict[str, float] = {}
    if ranks > tp and job.shards == 1:
        parts["gradient all-reduce"] = step.updates * all_reduce_seconds(gradients, devices, nodes, hardware)
    elif ranks > tp:
        gather = gather_seconds(weights, devices, nodes, hardware)
        forwards = step.forwards - job.rewards  # which are not sharded
        parts["weight all-gather"] = step.microbatches * (2 * models * step.epochs + forwards) * gather
        reduced = gather_seconds(gradients, devices, nodes, hardware)
        parts["gradient reduce-scatter"] = step.microbatches * step.epochs * reduced
        if step.sequences:
            gathers = 1 if step.gather_sampling else step.decode_batches * step.new_tokens
            parts["weight all-gather of sampling"] = gathers * gather
    if tp > 1:
        times = step.epochs * models * (4 + 2 * job.checkpointing) + 2 * step.forwards
        rows = times * step.tokens + 2 * (step.prompts * step.prompt_tokens + step.sequences * step.new_tokens)
        size = rows * shape.layers * shape.hidden * job.activation_bytes
        parts["activation all-reduce"] = all_reduce_seconds(size, within, between, hardware)
    return parts


OVERLAPS = ("gradient all-reduce", "weight all-gather", "gradient reduce-scatter")
"""Collectives that run beside the forward and backward passes; the others wait for each other."""


def bounds(parts: dict[str, float]) -> tuple[float, float]:
    """Return the seconds of a step whose overlapping collectives are hidden as far as they can be, and not at all."""
    total = sum(parts.values())
    hidden = sum(parts.get(name, 0.0) for name in OVERLAPS)
    compute = parts["forward and backward"] + parts["forward of frozen models and log-probs"]
    return total - min(hidden, compute), total
