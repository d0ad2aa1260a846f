"""Whether an engine elsewhere has the weights of the model that trains.

An engine that keeps old weights reports no error: its responses are those of an earlier policy. Two things tell it from
the right one: a fingerprint that is sent with the weights and asked for again, which any change shows in, and the
log-probabilities of a probe prompt, which are those of the weights it really computes with.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlhf_lightning.models.completion import unwrap, vocabulary_size
from rlhf_lightning.models.sharding import call

PROBE_PROMPT, PROBE_RESPONSE = 48, 16
"""Tokens of the probe's prompt, more than a server's prefix cache ignores, and of its response."""
MOVED = 1e-2
"""Nats by which a model's log-probability of a probe's token must change for an engine's to change, too."""
BLOCK = 1 << 22
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ODD = 0x9E3779B1


@torch.no_grad()
def fingerprint(lm: nn.Module) -> str:
    """Return 16 hex digits of the weights of a model, of a sharded one those of this rank's part.

    Sums of the bits, weighted by place, are computed where the weights are: the same on every device, and another when
    any one weight changes.
    """
    digest = hashlib.sha256()
    sums: list[Tensor] = []
    for name, parameter in lm.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[operator]
        digest.update(f"{name} {tuple(local.shape)} {local.dtype}".encode())
        bits = local.detach().contiguous().view(-1).view(BITS[local.element_size()])
        total = torch.zeros((), dtype=torch.long, device=bits.device)
        for start in range(0, len(bits), BLOCK):
            block = bits[start : start + BLOCK].long()
            # odd numbers: a change times one of them is no multiple of 2**64
            places = torch.arange(start, start + len(block), device=bits.device) * 2 + 1
            total = total + (block * (places * ODD)).sum()
        sums.append(total)
    digest.update(repr([int(total) for total in torch.stack([total.cpu() for total in sums])]).encode())
    return digest.hexdigest()[:16]


class Probe:
    """Compares an engine's log-probabilities of a short response with those of the model that trains.

    Args:
        lm: the model that trains.
        tolerance: nats that their means may differ by, from other kernels and another precision.
    """

    def __init__(self, lm: nn.Module, tolerance: float) -> None:
        self.lm, self.tolerance = lm, tolerance
        vocabulary = vocabulary_size(lm)
        context = getattr(unwrap(lm).config.get_text_config(), "max_position_embeddings", None) or 10**9
        self.length = min(PROBE_RESPONSE, max(context // 4, 1))
        prompt = min(PROBE_PROMPT, max(context // 2, 1))
        # the upper half of the ids may have none in the tokenizer, which servers refuse
        self.prompt = [(37 * i + 11) % max(vocabulary // 2, 1) for i in range(prompt)]
        self.last: tuple[list[int], list[float], Tensor] | None = None

    def problem(self, tokens: Sequence[int], logprobs: Sequence[float]) -> str | None:
        """Return why a response to the prompt is not from the model's weights as they are now, None if it may be.

        Args:
            tokens: the response, sampled with temperature 1 from the whole distribution.
            logprobs: the engine's of its tokens.
        """
        own = self.own(tokens)
        gap = (own - torch.tensor(logprobs, dtype=torch.float64)).abs().mean().item()
        last, self.last = self.last, (list(tokens), list(logprobs), own)
        if not math.isfinite(gap) or gap > self.tolerance:
            return f"its log-probabilities of a probe are off by {gap:.2g} (mean of {len(own)} tokens)"
        if last is not None and last[:2] == self.last[:2]:
            moved = (own - last[2]).abs().max().item()
            if moved > MOVED:
                return f"its log-probabilities of a probe stayed the same while the model's moved by {moved:.2g}"
        return None

    @torch.no_grad()
    def own(self, tokens: Sequence[int]) -> Tensor:
        """Return the model's log-probabilities (T,) of a response to the prompt, float64 on the CPU."""
        ids = torch.tensor([[*self.prompt, *tokens]], device=unwrap(self.lm).device)
        training = self.lm.training
        self.lm.eval()
        try:
            logits = call(self.lm, input_ids=ids, use_cache=False).logits[0, len(self.prompt) - 1 : -1]
        finally:
            self.lm.train(training)
        return logits.double().log_softmax(-1).gather(1, ids[0, len(self.prompt) :, None]).squeeze(1).cpu()
