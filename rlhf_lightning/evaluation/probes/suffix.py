"""A bounded gradient-guided search for a suffix that makes a model comply: greedy coordinate gradient.

Zou et al. 2023 (arXiv 2307.15043), algorithm 1. Each step takes the gradient of the loss of a compliant opening with
respect to the one-hot token at every place of the suffix, evaluates some of the substitutions that it ranks highest,
and takes the best of them. Two differences: a substitution is taken only if it lowers the loss, so the loss never
rises, and every suffix has the same tokens once it is decoded and encoded, so it is a text that can be typed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rlhf_lightning.data.messages import Message
from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.completion import CompletionModel, choose_layout, response_logprobs, unwrap, vocabulary_size
from rlhf_lightning.ops.groups import Group, Layout
from rlhf_lightning.ops.seeding import permutation

TOGETHER = 8
"""Suffixes in a completion group, which share the tokens before the suffix."""
TRIED = 2000
"""Tokens tried at each place of the first suffix."""


class Request:
    """A conversation whose last message may be followed by a suffix, and the opening of a response to it.

    Args:
        template: encodes the conversation.
        conversation: messages; the last is the user's.
        target: the compliant opening, which is encoded as that of a response.
    """

    def __init__(self, template: Template, conversation: Sequence[Message], target: str) -> None:
        self.template, self.conversation = template, list(conversation)
        self.target = template.content(target)
        if not self.target:
            raise UserError("the compliant opening of a response has no tokens; give a text in the column `target`")
        self._question = template.content(self.conversation[-1]["content"])
        self._decoded = len(self._decode(self._question))
        one, other = (self._ids(letter) for letter in "ab")
        # what follows the user's text: the tokens in which two conversations end alike
        same = next((i for i, pair in enumerate(zip(one[::-1], other[::-1], strict=False)) if pair[0] != pair[1]), 0)
        self.after = one[len(one) - same :]

    def text(self, suffix: Sequence[int]) -> str:
        """Return the text that tokens add to the user's message."""
        return self._decode([*self._question, *suffix])[self._decoded :]

    def before(self, suffix: Sequence[int]) -> list[int] | None:
        """Return the tokens in front of a suffix, or None where its text is encoded as other tokens than these."""
        ids, end = self._ids(self.text(suffix)), len(self.after)
        begin = len(ids) - end - len(suffix)
        found = begin > 0 and ids[begin : len(ids) - end] == list(suffix) and ids[len(ids) - end :] == self.after
        return ids[:begin] if found else None

    def _decode(self, ids: Sequence[int]) -> str:
        # what some tokenizers do to spaces in front of punctuation would give other tokens
        return self.template.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _ids(self, text: str) -> list[int]:
        """Return the tokens of the conversation whose last message ends with `text`."""
        *before, last = self.conversation
        return self.template.prompt([*before, last | {"content": last["content"] + text}])


@dataclass(frozen=True)
class Suffix:
    """What a search found: the text to append to the user's message, its tokens, and the text it began with.

    `losses` has the mean negative log-likelihood of the target in nats per token, at the start and after every step.
    """

    text: str
    ids: list[int]
    start: str
    losses: list[float]


def search(
    lm: Any,
    requests: Sequence[Request],
    *,
    length: int = 10,
    steps: int = 20,
    candidates: int = 64,
    top_k: int = 64,
    seed_parts: Sequence[int | str] = (0,),
    progress: Callable[[], Any] | None = None,
) -> Suffix:
    """Return the suffix with the lowest loss that was found; one for all requests, whose losses are averaged.

    Args:
        lm: a Hugging Face causal LM, or a peft model around one, on the device where it computes.
        requests: one, or several for a universal suffix.
        length: tokens of the suffix.
        steps: each takes one gradient and evaluates at most `candidates` suffixes.
        candidates: substitutions per step, drawn from `length` x `top_k`; as many or more evaluates all of them.
        top_k: tokens per place, those whose substitution lowers the loss most to first order.
        seed_parts: decide the first suffix and the draws.
        progress: called after each step.

    Raises:
        UserError: no text of this tokenizer keeps its tokens behind this conversation.
    """
    training = lm.training
    lm.eval()
    try:
        layout, _ = choose_layout(lm)
        allowed = typed_tokens(requests[0].template, vocabulary_size(lm)).to(unwrap(lm).device)
        best = _start(requests, allowed, length, seed_parts)
        first = requests[0].text(best)
        losses = target_losses(lm, requests, [best], layout)
        for step in range(steps):
            tried = list(_substitutions(lm, requests, best, allowed, top_k, candidates, (*seed_parts, step)))
            values = target_losses(lm, requests, tried, layout)
            place = min(range(len(values)), key=values.__getitem__, default=None)
            if place is not None and values[place] < losses[-1]:
                best = tried[place]
                losses.append(values[place])
            else:
                losses.append(losses[-1])
            if progress:
                progress()
    finally:
        lm.train(training)
    return Suffix(requests[0].text(best), best, first, losses)


def target_losses(
    lm: Any, requests: Sequence[Request], suffixes: Sequence[Sequence[int]], layout: Layout
) -> list[float]:
    """Return for each suffix the negative log-likelihood of the targets, in nats per token, averaged over requests."""
    groups, owners = [], list[list[int]]()
    for request in requests:
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)  # what stands in front of a suffix is computed once
        for place, suffix in enumerate(suffixes):
            alike[tuple(request.before(suffix) or ())].append(place)
        for before, places in alike.items():
            for begin in range(0, len(places), TOGETHER):
                owners.append(places[begin : begin + TOGETHER])
                tails = [[*suffixes[place], *request.after, *request.target] for place in owners[-1]]
                mask = [[False] * (len(tail) - len(request.target)) + [True] * len(request.target) for tail in tails]
                groups.append(Group(before, tails, mask))
    totals = [0.0] * len(suffixes)
    found = response_logprobs(CompletionModel(lm), groups, layout, unwrap(lm).device, tokens=2048)
    for chosen, logprobs in zip(owners, found, strict=True):
        for place, values in zip(chosen, logprobs, strict=True):
            totals[place] -= values.double().mean().item() / len(requests)
    return totals


def suffix_gradient(lm: Any, request: Request, suffix: Sequence[int]) -> Tensor:
    """Return d loss / d one-hot token (length, V) at every place of the suffix, in nats per token of the target."""
    before = request.before(suffix)
    assert before is not None
    inner = unwrap(lm)
    embed: Any = inner.get_input_embeddings()
    ids = torch.tensor([*before, *suffix, *request.after, *request.target], device=inner.device)
    target = ids[len(ids) - len(request.target) :]
    with torch.inference_mode(False), torch.enable_grad():
        # a module that scales its rows does so here, too
        table = embed(torch.arange(vocabulary_size(lm), device=inner.device)).detach()
        places = table[ids[len(before) : len(before) + len(suffix)]].clone().requires_grad_()
        inputs = torch.cat([table[ids[: len(before)]], places, table[ids[len(before) + len(suffix) :]]])
        logits = lm(inputs_embeds=inputs[None], use_cache=False).logits[0, -len(target) - 1 : -1]
        (gradient,) = torch.autograd.grad(cross_entropy(logits.float(), target), places)
    return (gradient @ table.T).float()


def typed_tokens(template: Template, size: int) -> Tensor:
    """Return which of `size` tokens (V,) are printable ASCII text with at least one character that is no space."""
    known = min(size, len(template.tokenizer))
    texts = template.tokenizer.batch_decode([[i] for i in range(known)], clean_up_tokenization_spaces=False)
    typed = [text.isascii() and text.isprintable() and bool(text.strip()) for text in texts]
    control = template.encoder.control_ids
    return torch.tensor([ok and i not in control for i, ok in enumerate(typed)] + [False] * (size - known))


def _start(requests: Sequence[Request], allowed: Tensor, length: int, seed_parts: Sequence[int | str]) -> list[int]:
    """Return a first suffix of random tokens."""
    tokens, suffix = allowed.nonzero().squeeze(1).tolist(), list[int]()
    for place in range(length):
        order = permutation(len(tokens), *seed_parts, "start", place)[:TRIED].tolist()
        grown = ([*suffix, tokens[i]] for i in order)
        suffix = next((one for one in grown if _survives(requests, one)), suffix)
        if len(suffix) == place:
            raise UserError(
                f"no suffix of {length} tokens keeps its tokens when its text is encoded behind the request: "
                f"{requests[0].conversation[-1]['content']!r:.60}; try a shorter probe.jailbreaks.suffix_length"
            )
    return suffix


def _substitutions(
    lm: Any,
    requests: Sequence[Request],
    suffix: list[int],
    allowed: Tensor,
    top_k: int,
    candidates: int,
    seed_parts: Sequence[int | str],
) -> Iterator[list[int]]:
    """Yield suffixes with one token replaced, drawn from the `top_k` of every place."""
    gradient = torch.stack([suffix_gradient(lm, request, suffix) for request in requests]).mean(0)
    gradient = gradient.masked_fill(~allowed, float("inf"))
    k = min(top_k, int(allowed.sum()))
    best = gradient.topk(k, largest=False).indices.tolist()
    found = 0
    for draw in permutation(len(suffix) * k, *seed_parts).tolist():
        place, token = draw // k, best[draw // k][draw % k]
        changed = [*suffix[:place], token, *suffix[place + 1 :]]
        if token != suffix[place] and _survives(requests, changed):
            yield changed
            found += 1
            if found == candidates:
                return


def _survives(requests: Sequence[Request], suffix: Sequence[int]) -> bool:
    """Return whether the text of a suffix is encoded as its tokens in every conversation, behind the same tokens."""
    return all(request.before(suffix) is not None for request in requests)
