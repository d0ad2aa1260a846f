"""Generation by the continuous batching of transformers: paged keys and values, and requests that join a running batch.

One seed decides all samples of a call, so they depend on what is sampled together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.generation.engine import Engine, Generations
from rlhf_lightning.generation.staleness import Probe
from rlhf_lightning.models.attention import GROUP_SDPA, HALF
from rlhf_lightning.models.completion import unwrap
from rlhf_lightning.models.sharding import has_parts
from rlhf_lightning.ops.seeding import derive_seed

PAGE = 256
"""Tokens of a page of the cache."""
FORWARD = 1024
"""Tokens of a forward pass, at most: attention without flash kernels has a mask of them times the cache."""


class ContinuousEngine(Engine):
    """Samples responses by transformers' continuous batching, from the model in this process.

    It computes in the precision of the weights, also where the Trainer's is mixed. The cache is freed after each call.

    Args:
        batch_tokens: prompt plus response tokens in the cache, which is allocated at once; requests that have no room
            wait.
        top_k, top_p: restrict the distribution (0 and 1.0 leave it whole). PPO needs it whole.
    """

    def __init__(self, batch_tokens: int = 32_768, top_k: int = 0, top_p: float = 1.0) -> None:
        check_number("sampler.batch_tokens", batch_tokens, "[1, inf)", whole=True)
        check_number("sampler.top_k", top_k, "[0, inf)", whole=True)
        check_number("sampler.top_p", top_p, "(0, 1]")
        self.batch_tokens, self.top_k, self.top_p = batch_tokens, top_k, top_p
        self.close()

    def start(self, lm: nn.Module, eos_ids: Iterable[int]) -> None:
        """Take a Hugging Face causal LM, or a peft model around one, and the tokens that end a response.

        Raises:
            UserError: a sharded model.
        """
        if has_parts(lm):
            raise UserError("sampler=continuous reads whole weights: use sampler=local with a model that is sharded")
        self.lm, self.eos, self.checked = lm, sorted(set(eos_ids)), False

    def close(self) -> None:
        """Release the model."""
        self.lm: Any = None
        self.eos: list[int] = []
        self.checked = False

    def sync(self) -> None:
        """Compare the paged attention with the model's own, once; the weights are those of the model.

        Raises:
            UserError: they differ.
        """
        if self.checked:
            return
        exact = unwrap(self.lm).dtype not in HALF
        with torch.autocast(unwrap(self.lm).device.type, enabled=False):
            probe = Probe(self.lm, 1e-2 if exact else 0.5)
            found = self._sample([probe.prompt], 1, [probe.length], [], 1.0, 0, None)
            assert found.logprobs is not None
            if problem := probe.problem(found.responses[0], found.logprobs[0]):
                raise UserError(
                    f"sampler=continuous cannot sample {type(unwrap(self.lm)).__name__}: {problem}; use sampler=local"
                )
        self.checked = True

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int = 1,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed_parts: Sequence[int | str] = (0,),
        ids: Sequence[int] | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> Generations:
        """Return `num_generations` responses to each prompt, see :meth:`Engine.generate`."""
        if not prompts:
            return Generations([], [], [])
        ids = list(range(len(prompts))) if ids is None else ids
        seed = derive_seed("continuous", *seed_parts, *ids) % 2**31
        context = getattr(unwrap(self.lm).config.get_text_config(), "max_position_embeddings", None) or 10**9
        limits = [max(min(max_new_tokens, context - len(prompt)), 1) for prompt in prompts]
        truncation = {"top_k": self.top_k, "top_p": self.top_p}
        return self._sample(prompts, num_generations, limits, self.eos, temperature, seed, progress, **truncation)

    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        limits: Sequence[int],
        eos: list[int],
        temperature: float,
        seed: int,
        progress: Callable[[int], Any] | None,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Generations:
        """Return n responses to each prompt, of at most so many tokens each."""
        inner: Any = unwrap(self.lm)
        given, n = n, n if temperature else 1  # the most likely response is the same each time
        settings = GenerationConfig(
            do_sample=temperature > 0, temperature=temperature or None, top_k=top_k, top_p=top_p,
            num_return_sequences=n, max_new_tokens=max(limits), eos_token_id=eos or -1, pad_token_id=0,
        )  # fmt: skip
        pages = [-(-(len(prompt) + limit) // PAGE) for prompt, limit in zip(prompts, limits, strict=True)]
        batching = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=max(self.batch_tokens // PAGE, max(pages) + 1),
            max_batch_tokens=FORWARD,
            return_logprobs=True,
            seed=seed,
            auto_switch_to_flash=False,  # which would download a kernel
        )
        names = [f"p{place}" for place in range(len(prompts))]
        found: dict[str, Any] = {}
        training, devices = inner.training, [inner.device] if inner.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():  # it seeds torch for the whole process
            try:
                with (
                    plain_attention(inner),
                    inner.continuous_batching_context_manager(
                        settings, timeout=60, continuous_batching_config=batching
                    ) as manager,
                ):
                    for name, prompt, limit in zip(names, prompts, limits, strict=True):
                        manager.add_request(list(prompt), name, max_new_tokens=limit, eos_token_id=eos or -1)
                    remaining = dict.fromkeys(names, n)
                    while len(found) < n * len(prompts):
                        result = manager.get_result(timeout=1)
                        if result is None:
                            if not manager.is_running():
                                break
                            continue
                        if not result.is_finished():
                            continue
                        found[result.request_id] = result
                        name = result.request_id.partition("__child#")[0]
                        remaining[name] -= 1
                        if progress and not remaining[name]:
                            progress(1)
            except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise UserError(self._failed(f"{type(error).__name__}: {error}")) from error
            finally:
                inner.train(training)
        results = [found.get(f"{name}__child#{k}" if k < n - 1 else name) for name in names for k in range(n)]
        failed = next((r for r in results if r is None or r.error is not None), None)
        if failed is not None or None in results:
            raise UserError(self._failed(getattr(failed, "error", None) or "its generation loop ended early"))
        done = [result for result in results if result is not None for _ in range(given // n)]
        responses = [list(result.generated_tokens) for result in done]
        finished = [response[-1] in eos for response in responses]
        return Generations(responses, finished, [list(result.logprobs) for result in done])

    def _failed(self, reason: str) -> str:
        """Return the message of a failure, on one line."""
        name = type(unwrap(self.lm)).__name__
        return f"sampler=continuous cannot sample {name}: {' '.join(reason.split())[:200]}; use sampler=local"


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Read with Hugging Face's attention, which the one of completion groups is where there are no groups."""
    given = model.config._attn_implementation
    if given != GROUP_SDPA:
        yield
        return
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(given)
